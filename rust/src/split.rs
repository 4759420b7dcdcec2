//! Cutting text into pieces: a hand-written scanner for the named patterns.
//!
//! The published patterns `qwen2`, `llama3` and `gpt4-2` are one rule with a
//! different longest digit run (1, 3, 2). In order, at each position:
//!
//! 1. `'s 't 're 've 'm 'll 'd` in any case (`s` also as U+017F, as simple
//!    case folding has it);
//! 2. letters, with one leading character that is no letter, digit, CR or LF;
//! 3. up to N digits;
//! 4. characters that are none of the above, with one leading space and all
//!    following CR and LF;
//! 5. white space up to its last CR or LF;
//! 6. white space up to the character before the next piece, or to the end.
//!
//! `\s*[\r\n]` (gpt4-2) and `\s*[\r\n]+` (the other two) match the same text,
//! and the possessive quantifiers of gpt4-2 never change a match. Tests hold
//! this scanner equal to real regex engines.

use std::str::FromStr;

use crate::error::{Error, ErrorKind};
use crate::unicode::{Class, Table};

/// A named rule for cutting text into pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pattern {
    /// Qwen2's pattern: single digits.
    Qwen2,
    /// Llama 3's pattern: runs of at most three digits.
    Llama3,
    /// GPT-4's pattern with runs of at most two digits, as nanochat has it.
    Gpt4Two,
}

impl Pattern {
    /// All patterns.
    pub const ALL: [Pattern; 3] = [Pattern::Qwen2, Pattern::Llama3, Pattern::Gpt4Two];

    /// The name by which recipes know the pattern.
    pub fn name(self) -> &'static str {
        match self {
            Pattern::Qwen2 => "qwen2",
            Pattern::Llama3 => "llama3",
            Pattern::Gpt4Two => "gpt4-2",
        }
    }

    fn max_digits(self) -> usize {
        match self {
            Pattern::Qwen2 => 1,
            Pattern::Gpt4Two => 2,
            Pattern::Llama3 => 3,
        }
    }
}

impl FromStr for Pattern {
    type Err = Error;

    fn from_str(name: &str) -> Result<Pattern, Error> {
        Pattern::ALL
            .into_iter()
            .find(|p| p.name() == name)
            .ok_or_else(|| {
                let known = Pattern::ALL.map(Pattern::name).join(", ");
                let message = format!("there is no pattern {name:?}; the patterns are {known}");
                Error::new(ErrorKind::UnknownPattern, message)
            })
    }
}

/// The pieces of `text`; joined they are `text` again.
pub fn split(text: &str, pattern: Pattern) -> Pieces<'_> {
    Pieces {
        text,
        at: 0,
        max_digits: pattern.max_digits(),
        table: Table::get(),
    }
}

/// Iterator over the pieces of a text; see [`split`].
pub struct Pieces<'a> {
    text: &'a str,
    at: usize,
    max_digits: usize,
    table: &'static Table,
}

impl<'a> Iterator for Pieces<'a> {
    type Item = &'a str;

    #[inline]
    fn next(&mut self) -> Option<&'a str> {
        let start = self.at;
        if start >= self.text.len() {
            return None;
        }
        self.at = self.end_of_piece(start);
        Some(&self.text[start..self.at])
    }
}

impl Pieces<'_> {
    /// Where the piece that starts at `start` ends.
    #[inline]
    fn end_of_piece(&self, start: usize) -> usize {
        let bytes = self.text.as_bytes();
        let (class, len) = self.table.at(bytes, start);
        let second = start + len;
        match class {
            Class::Letter => self.run(second, Class::Letter),
            Class::Number => self.digits(second),
            Class::Other => {
                if bytes[start] == b'\'' {
                    if let Some(end) = contraction(bytes, second) {
                        return end;
                    }
                }
                if let Some((Class::Letter, len)) = self.class_at(second) {
                    return self.run(second + len, Class::Letter);
                }
                self.punctuation(second)
            }
            Class::Space => match self.class_at(second) {
                Some((Class::Letter, len)) => self.run(second + len, Class::Letter),
                Some((Class::Other, len)) if bytes[start] == b' ' => self.punctuation(second + len),
                _ => self.white_space(start),
            },
            Class::Newline => self.white_space(start),
        }
    }

    #[inline(always)]
    fn class_at(&self, at: usize) -> Option<(Class, usize)> {
        (at < self.text.len()).then(|| self.table.at(self.text.as_bytes(), at))
    }

    /// End of the run of `class` that goes on at `at`.
    #[inline]
    fn run(&self, mut at: usize, class: Class) -> usize {
        while let Some((found, len)) = self.class_at(at) {
            if found != class {
                break;
            }
            at += len;
        }
        at
    }

    /// End of a digit run whose first digit lies before `at`.
    #[inline]
    fn digits(&self, mut at: usize) -> usize {
        for _ in 1..self.max_digits {
            match self.class_at(at) {
                Some((Class::Number, len)) => at += len,
                _ => break,
            }
        }
        at
    }

    /// End of a punctuation run with its newlines.
    #[inline]
    fn punctuation(&self, at: usize) -> usize {
        self.run(self.run(at, Class::Other), Class::Newline)
    }

    /// End of the piece that begins with white space at `start`.
    #[inline]
    fn white_space(&self, start: usize) -> usize {
        let mut at = start;
        let mut last = start; // where the last white-space character begins
        let mut after_newline = None;
        loop {
            match self.class_at(at) {
                Some((Class::Newline, len)) => {
                    last = at;
                    at += len;
                    after_newline = Some(at);
                }
                Some((Class::Space, len)) => {
                    last = at;
                    at += len;
                }
                next => {
                    return match (after_newline, next) {
                        (Some(end), _) => end,
                        (None, None) => at,
                        // One space stays for the piece that follows.
                        (None, Some(_)) if last > start => last,
                        (None, Some(_)) => at,
                    };
                }
            }
        }
    }
}

/// End of the contraction whose letters begin at `at`, right after `'`.
fn contraction(bytes: &[u8], at: usize) -> Option<usize> {
    let lower = |i: usize| bytes.get(at + i).map(u8::to_ascii_lowercase);
    match (lower(0)?, lower(1)) {
        (b's' | b't' | b'm' | b'd', _) => Some(at + 1),
        (b'r' | b'v', Some(b'e')) | (b'l', Some(b'l')) => Some(at + 2),
        (0xC5, Some(0xBF)) => Some(at + 2), // U+017F, the long s
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(text: &str, pattern: Pattern) -> Vec<&str> {
        split(text, pattern).collect()
    }

    #[test]
    fn words_contractions_and_punctuation() {
        let text = "I'm sure they'LL say 'hello'!!\n\n ok";
        let expected = [
            "I", "'m", " sure", " they", "'LL", " say", " '", "hello", "'!!\n\n", " ok",
        ];
        assert_eq!(pieces(text, Pattern::Qwen2), expected);
        assert_eq!(
            pieces("'tis (word) $x", Pattern::Qwen2),
            ["'t", "is", " (", "word", ")", " $", "x"]
        );
    }

    #[test]
    fn digits_by_pattern() {
        assert_eq!(
            pieces("a 12345", Pattern::Qwen2),
            ["a", " ", "1", "2", "3", "4", "5"]
        );
        assert_eq!(
            pieces("a 12345", Pattern::Gpt4Two),
            ["a", " ", "12", "34", "5"]
        );
        assert_eq!(pieces("a 12345", Pattern::Llama3), ["a", " ", "123", "45"]);
    }

    #[test]
    fn white_space() {
        assert_eq!(pieces("a   b", Pattern::Qwen2), ["a", "  ", " b"]);
        assert_eq!(
            pieces("a  \n \n  b", Pattern::Qwen2),
            ["a", "  \n \n", " ", " b"]
        );
        assert_eq!(pieces("a  ", Pattern::Qwen2), ["a", "  "]);
        assert_eq!(
            pieces("\t1\t\t!", Pattern::Qwen2),
            ["\t", "1", "\t", "\t", "!"]
        );
    }

    #[test]
    fn unknown_pattern_is_named() {
        let error = "gpt9".parse::<Pattern>().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnknownPattern);
        assert!(error.to_string().contains("gpt9"));
    }
}

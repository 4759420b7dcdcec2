//! Cutting text into pieces: the named patterns, and any regex.
//!
//! The published patterns `qwen2`, `llama3` and `gpt4-2` are one rule with a
//! different longest digit run (1, 3, 2); `o200k` is a rule of its own. With
//! `+marks` behind the name combining marks count as letters, which keeps the
//! words of Hindi, Tamil or Thai whole. [`Pattern::regex`] has the regex of
//! each. No regex engine runs for them: [`crate::blocks`] finds where pieces
//! begin for up to 64 bytes at a time, [`crate::scan`] one piece at a time
//! (it is the readable twin, and what the blocks fall back on). Tests hold
//! both equal to real regex engines. Training and encoding call [`split`].

use std::collections::HashMap;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::str::FromStr;
use std::sync::{Mutex, OnceLock, PoisonError};

use fancy_regex::{Matches, Regex, RegexBuilder};

use crate::blocks::Blocks;
use crate::error::{Error, ErrorKind};
use crate::unicode::{Class, ClassSet, Table};

/// What a custom pattern's name begins with; the regex follows.
const CUSTOM: &str = "regex:";
/// Custom regexes kept at most: each is kept until the process ends.
const MAX_CUSTOM: usize = 256;

/// A rule for cutting text into pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Pattern {
    /// Qwen2's pattern: single digits.
    Qwen2,
    /// Llama 3's pattern: runs of at most three digits.
    Llama3,
    /// GPT-4's pattern with runs of at most two digits, as nanochat has it.
    Gpt4Two,
    /// GPT-4o's pattern: words are also cut where lower case meets upper.
    O200k,
    /// [`Pattern::Qwen2`] with combining marks as letters.
    Qwen2Marks,
    /// [`Pattern::Llama3`] with combining marks as letters.
    Llama3Marks,
    /// [`Pattern::Gpt4Two`] with combining marks as letters.
    Gpt4TwoMarks,
    /// [`Pattern::O200k`] with combining marks as letters everywhere.
    O200kMarks,
    /// Any regex; see [`Pattern::custom`].
    Custom(CustomPattern),
}

impl Pattern {
    /// All named patterns.
    pub const ALL: [Pattern; 8] = [
        Pattern::Qwen2,
        Pattern::Llama3,
        Pattern::Gpt4Two,
        Pattern::O200k,
        Pattern::Qwen2Marks,
        Pattern::Llama3Marks,
        Pattern::Gpt4TwoMarks,
        Pattern::O200kMarks,
    ];

    /// A pattern from a regex in the syntax of the crate `fancy-regex`.
    ///
    /// Matches are pieces, and so is the text between two matches; an empty
    /// match cuts where it stands. (HF tokenizers calls this "Isolated".) Where
    /// the engine gives up on a text (its limit of backtracking steps), the
    /// rest of that text is one piece.
    ///
    /// A compiled regex is kept for the life of the process, so that a
    /// `Pattern` stays a small `Copy` value; hence at most 256 different ones.
    pub fn custom(regex: &str) -> Result<Pattern, Error> {
        static KNOWN: OnceLock<Mutex<HashMap<String, &'static Custom>>> = OnceLock::new();
        let known = KNOWN.get_or_init(Mutex::default);
        let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&custom) = known.get(regex) {
            return Ok(Pattern::Custom(CustomPattern(custom)));
        }
        let refuse = |why: String| {
            let message = format!("the split regex {regex:?} does not work: {why}");
            Err(Error::new(ErrorKind::InvalidRegex, message))
        };
        if known.len() >= MAX_CUSTOM {
            return refuse(format!("{MAX_CUSTOM} others are in use already"));
        }
        let compiled = match RegexBuilder::new(regex).build() {
            Ok(compiled) => compiled,
            Err(error) => return refuse(error.to_string()),
        };
        let custom: &'static Custom = Box::leak(Box::new(Custom {
            name: format!("{CUSTOM}{regex}"),
            regex: compiled,
        }));
        known.insert(regex.to_owned(), custom);
        Ok(Pattern::Custom(CustomPattern(custom)))
    }

    /// The name by which recipes know the pattern; `regex:...` if custom.
    pub fn name(self) -> &'static str {
        match self {
            Pattern::Qwen2 => "qwen2",
            Pattern::Llama3 => "llama3",
            Pattern::Gpt4Two => "gpt4-2",
            Pattern::O200k => "o200k",
            Pattern::Qwen2Marks => "qwen2+marks",
            Pattern::Llama3Marks => "llama3+marks",
            Pattern::Gpt4TwoMarks => "gpt4-2+marks",
            Pattern::O200kMarks => "o200k+marks",
            Pattern::Custom(CustomPattern(custom)) => &custom.name,
        }
    }

    /// The regex that the pattern stands for.
    ///
    /// `\s*[\r\n]` (gpt4-2) and `\s*[\r\n]+` (the others) match the same text,
    /// and the possessive quantifiers of gpt4-2 never change a match.
    pub fn regex(self) -> &'static str {
        match self {
            Pattern::Qwen2 => concat!(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            Pattern::Llama3 => concat!(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            Pattern::Gpt4Two => concat!(
                r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}",
                r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
            ),
            Pattern::O200k => concat!(
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*",
                r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
                r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+",
                r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}",
                r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            Pattern::Qwen2Marks => concat!(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}",
                r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            Pattern::Llama3Marks => concat!(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}",
                r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            Pattern::Gpt4TwoMarks => concat!(
                r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{M}\p{N}]?+[\p{L}\p{M}]+|\p{N}{1,2}",
                r"| ?[^\s\p{L}\p{M}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
            ),
            Pattern::O200kMarks => concat!(
                r"[^\r\n\p{L}\p{M}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*",
                r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
                r"|[^\r\n\p{L}\p{M}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+",
                r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}",
                r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            Pattern::Custom(CustomPattern(custom)) => &custom.name[CUSTOM.len()..],
        }
    }

    /// What the scanners need to know; None if the pattern is custom.
    pub(crate) fn rule(self) -> Option<Rule> {
        let (family, max_digits, marks) = match self {
            Pattern::Qwen2 => (Family::Gpt4, 1, false),
            Pattern::Llama3 => (Family::Gpt4, 3, false),
            Pattern::Gpt4Two => (Family::Gpt4, 2, false),
            Pattern::O200k => (Family::O200k, 3, false),
            Pattern::Qwen2Marks => (Family::Gpt4, 1, true),
            Pattern::Llama3Marks => (Family::Gpt4, 3, true),
            Pattern::Gpt4TwoMarks => (Family::Gpt4, 2, true),
            Pattern::O200kMarks => (Family::O200k, 3, true),
            Pattern::Custom(_) => return None,
        };
        let (mut letters, mut others) = (ClassSet::LETTERS, Class::Other.set());
        if marks {
            letters = letters.or(Class::Mark.set());
        } else {
            others = others.or(Class::Mark.set());
        }
        Some(Rule {
            family,
            max_digits,
            letters,
            others,
        })
    }

    /// The first place at or after `from` where a piece begins whatever comes
    /// before or after, so that the text may be cut there: the pieces of both
    /// parts are the pieces of the whole.
    ///
    /// That is where something that never belongs to a word follows a letter:
    /// white space, a number, or punctuation other than an apostrophe. None
    /// where there is no such place; a custom pattern has none.
    pub(crate) fn safe_cut(self, text: &str, from: usize) -> Option<usize> {
        self.rule()?;
        let (bytes, table) = (text.as_bytes(), Table::get());
        let mut at = (from..text.len()).find(|&i| text.is_char_boundary(i))?;
        let mut after_letter = false;
        while at < bytes.len() {
            let (class, len) = table.at(bytes, at);
            let ends_word = match class {
                Class::Space | Class::Newline | Class::Number => true,
                Class::Other => bytes[at] != b'\'',
                _ => false,
            };
            if after_letter && ends_word {
                return Some(at);
            }
            after_letter = ClassSet::LETTERS.has(class);
            at += len;
        }
        None
    }
}

impl FromStr for Pattern {
    type Err = Error;

    fn from_str(name: &str) -> Result<Pattern, Error> {
        if let Some(regex) = name.strip_prefix(CUSTOM) {
            return Pattern::custom(regex);
        }
        Pattern::ALL
            .into_iter()
            .find(|p| p.name() == name)
            .ok_or_else(|| {
                let known = Pattern::ALL.map(Pattern::name).join(", ");
                let message = format!(
                    "there is no pattern {name:?}; the patterns are {known}, or {CUSTOM} and a regex"
                );
                Error::new(ErrorKind::UnknownPattern, message)
            })
    }
}

/// A compiled regex of the user's; made by [`Pattern::custom`].
#[derive(Clone, Copy)]
pub struct CustomPattern(&'static Custom);

struct Custom {
    name: String,
    regex: Regex,
}

impl PartialEq for CustomPattern {
    fn eq(&self, other: &Self) -> bool {
        self.0.name == other.0.name
    }
}

impl Eq for CustomPattern {}

impl Hash for CustomPattern {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.name.hash(state);
    }
}

impl fmt::Debug for CustomPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0.name)
    }
}

/// Which of the two published rules a named pattern follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    /// qwen2, llama3, gpt4-2
    Gpt4,
    /// o200k
    O200k,
}

/// A named pattern as the scanners see it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rule {
    pub(crate) family: Family,
    pub(crate) max_digits: usize,
    /// What a word is made of: letters, and marks if they count as such.
    pub(crate) letters: ClassSet,
    /// What a punctuation run is made of.
    pub(crate) others: ClassSet,
}

/// The pieces of `text`; joined they are `text` again.
#[inline]
pub fn split(text: &str, pattern: Pattern) -> Pieces<'_> {
    let source = match (pattern, pattern.rule()) {
        (_, Some(rule)) => Source::Blocks(Blocks::new(text, rule)),
        (Pattern::Custom(CustomPattern(custom)), _) => Source::Regex(Box::new(RegexPieces {
            matches: custom.regex.find_iter(text),
            at: 0,
            pending: None,
        })),
        _ => unreachable!("a pattern has a rule or is custom"),
    };
    Pieces {
        text,
        start: 0,
        base: 0,
        bits: 0,
        source,
    }
}

/// Iterator over the pieces of a text; see [`split`].
pub struct Pieces<'a> {
    text: &'a str,
    start: usize,
    base: usize,
    bits: u64, // pieces end at base + the place of each bit
    source: Source<'a>,
}

enum Source<'a> {
    Blocks(Blocks<'a>),
    Regex(Box<RegexPieces<'a>>),
}

impl Pieces<'_> {
    /// Where the next piece ends: the same pieces as the iterator, as offsets.
    ///
    /// A piece begins where the one before it ended, the first one at 0.
    #[inline(always)]
    pub fn next_end(&mut self) -> Option<usize> {
        if self.bits == 0 && !self.refill() {
            return None;
        }
        let end = self.base + self.bits.trailing_zeros() as usize;
        self.bits &= self.bits - 1;
        self.start = end;
        Some(end)
    }

    /// The next ends of pieces, at least one; false at the end of the text.
    #[inline(never)]
    fn refill(&mut self) -> bool {
        match &mut self.source {
            Source::Blocks(blocks) => match blocks.next_ends() {
                Some((base, bits)) => (self.base, self.bits) = (base, bits),
                None => return false,
            },
            Source::Regex(regex) => match regex.next_end(self.text.len()) {
                Some(end) => (self.base, self.bits) = (end, 1),
                None => return false,
            },
        }
        true
    }
}

impl<'a> Iterator for Pieces<'a> {
    type Item = &'a str;

    #[inline(always)]
    fn next(&mut self) -> Option<&'a str> {
        let start = self.start;
        let end = self.next_end()?;
        Some(&self.text[start..end])
    }
}

/// The pieces that a regex makes; see [`Pattern::custom`].
struct RegexPieces<'a> {
    matches: Matches<'static, 'a, str>,
    at: usize,              // where the last piece ended
    pending: Option<usize>, // end of a match whose preceding text was just given out
}

impl RegexPieces<'_> {
    /// Each call ends a piece behind the last one or takes a match away, so
    /// that a regex of empty matches cannot loop.
    fn next_end(&mut self, len: usize) -> Option<usize> {
        if let Some(end) = self.pending.take() {
            self.at = end;
            return Some(end);
        }
        while let Some(Ok(found)) = self.matches.next() {
            let (start, end) = (found.start(), found.end());
            if start > self.at {
                self.at = start;
                self.pending = (end > start).then_some(end);
                return Some(start);
            }
            if end > self.at {
                self.at = end;
                return Some(end);
            }
        }
        let rest = self.at < len;
        self.at = len;
        rest.then_some(len)
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
    fn o200k() {
        assert_eq!(
            pieces("getHTTPResponse they'Ll ok;\n//\n!", Pattern::O200k),
            ["get", "HTTPResponse", " they'Ll", " ok", ";\n//\n", "!"]
        );
    }

    #[test]
    fn marks_as_letters() {
        let text = "\u{939}\u{93f}\u{928}\u{94d}\u{926}\u{940}";
        assert!(pieces(text, Pattern::Qwen2).len() > 1);
        assert_eq!(pieces(text, Pattern::Qwen2Marks), [text]);
    }

    #[test]
    fn a_safe_cut_changes_no_piece() {
        let text = "It's (so) 12\u{4e2d}\u{ff0c}\u{939}\u{93f} \n a";
        for pattern in Pattern::ALL {
            for from in 0..=text.len() {
                let Some(at) = pattern.safe_cut(text, from) else {
                    continue;
                };
                let mut parts = pieces(&text[..at], pattern);
                parts.extend(pieces(&text[at..], pattern));
                assert_eq!(parts, pieces(text, pattern), "{at}");
            }
        }
    }

    #[test]
    fn unknown_pattern_is_named() {
        let error = "gpt9".parse::<Pattern>().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnknownPattern);
        assert!(error.to_string().contains("gpt9"));
    }
}

//! The scanner that finds one piece at a time: the readable twin.
//!
//! [`piece_end`] is the published rule in plain code. [`crate::blocks`] is
//! tested to give the same pieces, and calls it for the few spots that its
//! bit masks do not express. It never looks behind the start of a piece.
//!
//! The rule of qwen2, llama3 and gpt4-2; in order, at each position:
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
//! The rule of o200k differs in two points: instead of 1 and 2 it has words
//! (see [`Scanner::cased_word`]) with a contraction behind them, and in 4 the
//! newlines may have slashes among them.

use crate::split::{Family, Rule};
use crate::unicode::{Class, ClassSet, Table};

/// A text and the rule by which it is cut.
#[derive(Clone, Copy)]
pub(crate) struct Scanner<'a> {
    pub(crate) text: &'a str,
    pub(crate) rule: Rule,
    pub(crate) table: &'static Table,
}

impl<'a> Scanner<'a> {
    pub(crate) fn new(text: &'a str, rule: Rule) -> Scanner<'a> {
        let table = Table::get();
        Scanner { text, rule, table }
    }

    /// Where the piece that starts at `start` (a boundary below the end) ends.
    pub(crate) fn piece_end(&self, start: usize) -> usize {
        let bytes = self.text.as_bytes();
        let (class, len) = self.table.at(bytes, start);
        let second = start + len;
        match class {
            Class::Number => return self.digits(second),
            Class::Newline => return self.white_space(start),
            _ => {}
        }
        let next = self.class_at(second);
        match self.rule.family {
            Family::Gpt4 => {
                if self.rule.letters.has(class) {
                    return self.run(second, self.rule.letters);
                }
                if bytes[start] == b'\'' {
                    if let Some(end) = contraction(bytes, start) {
                        return end;
                    }
                }
                if let Some((next, len)) = next {
                    if self.rule.letters.has(next) {
                        return self.run(second + len, self.rule.letters);
                    }
                }
            }
            Family::O200k => {
                // A mark may lead a word as the character in front of it or
                // as its first letter; both ways the word ends alike.
                if is_word(class) {
                    return self.cased_word(start);
                }
                if next.is_some_and(|(next, _)| is_word(next)) {
                    return self.cased_word(second);
                }
            }
        }
        match next {
            _ if self.rule.others.has(class) => self.punctuation(second),
            Some((next, len)) if bytes[start] == b' ' && self.rule.others.has(next) => {
                self.punctuation(second + len)
            }
            _ => self.white_space(start),
        }
    }

    #[inline(always)]
    fn class_at(&self, at: usize) -> Option<(Class, usize)> {
        (at < self.text.len()).then(|| self.table.at(self.text.as_bytes(), at))
    }

    /// End of the run of characters in `set` that goes on at `at`.
    #[inline]
    fn run(&self, mut at: usize, set: ClassSet) -> usize {
        while let Some((class, len)) = self.class_at(at) {
            if !set.has(class) {
                break;
            }
            at += len;
        }
        at
    }

    /// End of a digit run whose first digit lies before `at`.
    fn digits(&self, mut at: usize) -> usize {
        for _ in 1..self.rule.max_digits {
            match self.class_at(at) {
                Some((Class::Number, len)) => at += len,
                _ => break,
            }
        }
        at
    }

    /// End of a punctuation run with its newlines.
    fn punctuation(&self, at: usize) -> usize {
        let mut at = self.run(at, self.rule.others);
        let slashes = self.rule.family == Family::O200k;
        let more = |b: u8| matches!(b, b'\r' | b'\n') || slashes && b == b'/';
        while self.text.as_bytes().get(at).is_some_and(|&b| more(b)) {
            at += 1;
        }
        at
    }

    /// End of o200k's word that begins at `start`, contraction included.
    ///
    /// With `U` for upper and title case, `l` for lower case and `b` for the
    /// letters and marks that count as both, the regex is `[Ub]*[lb]+`, else
    /// `[Ub]+[lb]*`. The first part takes all of a run of `U` and `b`. If `l`
    /// follows, the word goes on through `l` and `b`. If not, it gives back
    /// what comes after the last `b` of the run, so that this `b` is the second
    /// part; without any `b` the run alone is the word.
    fn cased_word(&self, start: usize) -> usize {
        let mut at = start;
        let mut after_both = None;
        let mut end = loop {
            match self.class_at(at) {
                Some((Class::Upper, len)) => at += len,
                Some((Class::Letter | Class::Mark, len)) => {
                    at += len;
                    after_both = Some(at);
                }
                Some((Class::Lower, _)) => break self.run(at, LOWER_OR_BOTH),
                _ => break after_both.unwrap_or(at),
            }
        };
        let bytes = self.text.as_bytes();
        if bytes.get(end) == Some(&b'\'') {
            end = contraction(bytes, end).unwrap_or(end);
        }
        end
    }

    /// End of the piece that begins with white space at `start`.
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

const LOWER_OR_BOTH: ClassSet = Class::Lower
    .set()
    .or(Class::Letter.set())
    .or(Class::Mark.set());

fn is_word(class: Class) -> bool {
    ClassSet::LETTERS.or(Class::Mark.set()).has(class)
}

/// End of the contraction whose apostrophe is at `at`, if it is one.
pub(crate) fn contraction(bytes: &[u8], at: usize) -> Option<usize> {
    let lower = |i: usize| bytes.get(at + i).map(u8::to_ascii_lowercase);
    match (lower(1)?, lower(2)) {
        (b's' | b't' | b'm' | b'd', _) => Some(at + 2),
        (b'r' | b'v', Some(b'e')) | (b'l', Some(b'l')) => Some(at + 3),
        (0xC5, Some(0xBF)) => Some(at + 3), // U+017F, the long s
        _ => None,
    }
}

//! The class of a character, as far as the split patterns can tell.
//!
//! The general categories come from `regex-syntax`, the tables behind the
//! `regex` crate: a scanner built on them agrees with that engine on `\p{L}`,
//! `\p{Lu}`, `\p{M}`, `\p{N}` and so on by construction, new Unicode versions
//! included. They are unpacked once, at first use, into a two-stage table of
//! about 100 kB. `split` and nothing else reads it.

use std::sync::OnceLock;

/// What a split pattern can ask about a character.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Class {
    /// Everything else: punctuation, symbols, unassigned.
    Other = 0,
    /// `\p{Lo}` and `\p{Lm}`: letters that o200k takes for upper and lower case
    Letter = 1,
    /// `\p{Lu}` and `\p{Lt}`
    Upper = 2,
    /// `\p{Ll}`
    Lower = 3,
    /// `\p{M}`
    Mark = 4,
    /// `\p{N}`
    Number = 5,
    /// `\s` without line feed and carriage return
    Space = 6,
    /// `\r` or `\n`
    Newline = 7,
}

impl Class {
    /// The set that holds this class alone.
    pub(crate) const fn set(self) -> ClassSet {
        ClassSet(1 << self as u8)
    }
}

/// A set of classes as a bit mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ClassSet(u8);

impl ClassSet {
    /// `\p{L}`
    pub(crate) const LETTERS: ClassSet = Class::Letter
        .set()
        .or(Class::Upper.set())
        .or(Class::Lower.set());

    pub(crate) const fn or(self, other: ClassSet) -> ClassSet {
        ClassSet(self.0 | other.0)
    }

    #[inline(always)]
    pub(crate) const fn has(self, class: Class) -> bool {
        self.bit(class) != 0
    }

    /// 1 if `class` is in the set, else 0.
    #[inline(always)]
    pub(crate) const fn bit(self, class: Class) -> u64 {
        (self.0 >> class as u8 & 1) as u64
    }
}

const BLOCK: usize = 256;
const NUM_BLOCKS: usize = 0x11_0000 / BLOCK;

/// Class of every code point: `blocks[index[c / 256]][c % 256]`.
pub(crate) struct Table {
    ascii: [Class; 128],
    index: Vec<u16>,
    blocks: Vec<[Class; BLOCK]>,
}

impl Table {
    /// The table, built at the first call.
    pub(crate) fn get() -> &'static Table {
        static TABLE: OnceLock<Table> = OnceLock::new();
        TABLE.get_or_init(Table::build)
    }

    fn build() -> Table {
        let mut classes = vec![Class::Other; NUM_BLOCKS * BLOCK];
        fill(&mut classes, r"\p{L}", Class::Letter);
        fill(&mut classes, r"[\p{Lu}\p{Lt}]", Class::Upper);
        fill(&mut classes, r"\p{Ll}", Class::Lower);
        fill(&mut classes, r"\p{M}", Class::Mark);
        fill(&mut classes, r"\p{N}", Class::Number);
        // White space ends at U+3000.
        for c in (0..=0x3000).filter_map(char::from_u32) {
            if c.is_whitespace() {
                classes[c as usize] = Class::Space;
            }
        }
        classes['\r' as usize] = Class::Newline;
        classes['\n' as usize] = Class::Newline;
        // Most blocks are all of one class; few of the others are alike.
        let mut blocks: Vec<[Class; BLOCK]> = Vec::new();
        let mut uniform = [None; 8];
        let mut index = Vec::with_capacity(NUM_BLOCKS);
        for chunk in classes.as_chunks::<BLOCK>().0 {
            let same = chunk.iter().all(|&class| class == chunk[0]);
            let known = if same {
                uniform[chunk[0] as usize]
            } else {
                None
            };
            let at = known.unwrap_or_else(|| {
                blocks.push(*chunk);
                blocks.len() as u16 - 1
            });
            if same {
                uniform[chunk[0] as usize] = Some(at);
            }
            index.push(at);
        }
        let mut ascii = [Class::Other; 128];
        ascii.copy_from_slice(&classes[..128]);
        Table {
            ascii,
            index,
            blocks,
        }
    }

    /// Class and UTF-8 length of the character that starts at `at`.
    ///
    /// `bytes` is valid UTF-8 and `at` a character boundary below its end.
    #[inline(always)]
    pub(crate) fn at(&self, bytes: &[u8], at: usize) -> (Class, usize) {
        let first = bytes[at];
        if first < 0x80 {
            (self.ascii[first as usize], 1)
        } else {
            self.at_wide(bytes, at)
        }
    }

    /// [`Table::at`] where the character is not ASCII.
    #[inline]
    pub(crate) fn at_wide(&self, bytes: &[u8], at: usize) -> (Class, usize) {
        let first = u32::from(bytes[at]);
        let low = |i: usize| u32::from(bytes[at + i] & 0x3F);
        let (c, len) = if first < 0xE0 {
            ((first & 0x1F) << 6 | low(1), 2)
        } else if first < 0xF0 {
            ((first & 0x0F) << 12 | low(1) << 6 | low(2), 3)
        } else {
            (
                (first & 0x07) << 18 | low(1) << 12 | low(2) << 6 | low(3),
                4,
            )
        };
        let block = self.index[c as usize / BLOCK] as usize;
        (self.blocks[block][c as usize % BLOCK], len)
    }
}

fn fill(classes: &mut [Class], pattern: &str, class: Class) {
    let hir = regex_syntax::parse(pattern).expect("the pattern is ours");
    let regex_syntax::hir::HirKind::Class(regex_syntax::hir::Class::Unicode(set)) = hir.kind()
    else {
        unreachable!("{pattern} is a Unicode class")
    };
    for range in set.ranges() {
        classes[range.start() as usize..=range.end() as usize].fill(class);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_of_well_known_characters() {
        let table = Table::get();
        let class = |c: char| {
            let mut buffer = [0; 4];
            let text = c.encode_utf8(&mut buffer);
            let (class, len) = table.at(text.as_bytes(), 0);
            assert_eq!(len, text.len());
            class
        };
        let cases: [(Class, &[char]); 8] = [
            (Class::Lower, &['a', '\u{e9}', '\u{17f}', '\u{1d41a}']),
            (Class::Upper, &['Z', '\u{1c5}', '\u{212a}', '\u{1d400}']),
            (Class::Letter, &['\u{4e2d}', '\u{2b0}', '\u{e01}', '\u{aa}']),
            (Class::Mark, &['\u{301}', '\u{93f}', '\u{94d}', '\u{20dd}']),
            (Class::Number, &['0', '\u{b2}', '\u{967}', '\u{2164}']),
            (
                Class::Space,
                &[
                    ' ', '\t', '\u{b}', '\u{85}', '\u{a0}', '\u{3000}', '\u{2028}',
                ],
            ),
            (
                Class::Other,
                &['!', '\u{1f600}', '\u{1c}', '\u{200b}', '\u{10ffff}'],
            ),
            (Class::Newline, &['\n', '\r']),
        ];
        for (expected, characters) in cases {
            for &c in characters {
                assert_eq!(class(c), expected, "{c:?}");
            }
        }
    }

    #[test]
    fn white_space_is_all_there() {
        let table = Table::get();
        for c in '\0'..=char::MAX {
            let mut buffer = [0; 4];
            let (class, _) = table.at(c.encode_utf8(&mut buffer).as_bytes(), 0);
            let white = matches!(class, Class::Space | Class::Newline);
            assert_eq!(white, c.is_whitespace(), "{c:?}");
        }
    }
}

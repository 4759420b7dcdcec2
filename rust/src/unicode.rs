//! The class of a character, as far as the split patterns can tell.
//!
//! The general categories come from `regex-syntax`, the tables behind the
//! `regex` crate: a scanner built on them agrees with that engine on `\p{L}`
//! and `\p{N}` by construction, new Unicode versions included. They are
//! unpacked once, at first use, into a two-stage table of about 40 kB.

use std::sync::OnceLock;

/// What a split pattern can ask about a character.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Class {
    /// Everything else: punctuation, symbols, marks, unassigned.
    Other = 0,
    /// `\p{L}`
    Letter = 1,
    /// `\p{N}`
    Number = 2,
    /// `\s` without line feed and carriage return
    Space = 3,
    /// `\r` or `\n`
    Newline = 4,
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
        fill(&mut classes, r"\p{N}", Class::Number);
        for c in 0..classes.len() as u32 {
            if char::from_u32(c).is_some_and(char::is_whitespace) {
                classes[c as usize] = Class::Space;
            }
        }
        classes['\r' as usize] = Class::Newline;
        classes['\n' as usize] = Class::Newline;
        let mut blocks: Vec<[Class; BLOCK]> = Vec::new();
        let mut index = Vec::with_capacity(NUM_BLOCKS);
        for chunk in classes.chunks_exact(BLOCK) {
            let known = blocks.iter().rposition(|b| b == chunk);
            let at = known.unwrap_or_else(|| {
                blocks.push(chunk.try_into().expect("a chunk is one block"));
                blocks.len() - 1
            });
            index.push(at as u16);
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

    #[inline]
    fn at_wide(&self, bytes: &[u8], at: usize) -> (Class, usize) {
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
        for c in ['a', 'Z', '\u{e9}', '\u{4e2d}', '\u{1d400}', '\u{2b0}'] {
            assert_eq!(class(c), Class::Letter, "{c:?}");
        }
        for c in ['0', '\u{b2}', '\u{0967}', '\u{2164}'] {
            assert_eq!(class(c), Class::Number, "{c:?}");
        }
        for c in [
            ' ', '\t', '\u{b}', '\u{85}', '\u{a0}', '\u{3000}', '\u{2028}',
        ] {
            assert_eq!(class(c), Class::Space, "{c:?}");
        }
        for c in [
            '!',
            '\u{301}',
            '\u{1f600}',
            '\u{1c}',
            '\u{200b}',
            '\u{10ffff}',
        ] {
            assert_eq!(class(c), Class::Other, "{c:?}");
        }
        assert_eq!(class('\n'), Class::Newline);
        assert_eq!(class('\r'), Class::Newline);
    }
}

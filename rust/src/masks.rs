//! The classes of 64 ASCII bytes as bit masks, one bit a byte.
//!
//! On x86-64 four times sixteen bytes are compared at once with SSE2, which
//! every such machine has; elsewhere eight at a time in an ordinary u64. Both
//! are tested equal to each other. Bytes of 0x80 and more are in `wide` and in
//! no other mask; [`crate::blocks`] looks at those characters one by one.

/// Bit `i` tells about byte `i` of a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Masks {
    pub(crate) letter: u64,
    pub(crate) upper: u64,
    pub(crate) number: u64,
    /// white space, newlines too
    pub(crate) white: u64,
    /// U+0020 only
    pub(crate) blank: u64,
    /// `\r` and `\n`
    pub(crate) newline: u64,
    /// the apostrophe
    pub(crate) quote: u64,
    pub(crate) slash: u64,
    pub(crate) wide: u64,
}

pub(crate) const BLOCK: usize = 64;

/// The masks of one block; `upper` and `slash` are only there if `CASED`.
#[inline(always)]
pub(crate) fn classify<const CASED: bool>(block: &[u8; BLOCK]) -> Masks {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE2 is part of x86-64.
    return unsafe { sse2::classify::<CASED>(block) };
    #[cfg(not(target_arch = "x86_64"))]
    return swar::classify::<CASED>(block);
}

/// Where a character goes on: the bytes 0x80 to 0xBF.
#[inline(always)]
pub(crate) fn inner_bytes(block: &[u8; BLOCK]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE2 is part of x86-64.
    return unsafe { sse2::inner_bytes(block) };
    #[cfg(not(target_arch = "x86_64"))]
    return swar::inner_bytes(block);
}

#[cfg(target_arch = "x86_64")]
mod sse2 {
    use std::arch::x86_64::{
        __m128i, _mm_add_epi8, _mm_cmpeq_epi8, _mm_cmplt_epi8, _mm_loadu_si128, _mm_min_epu8,
        _mm_movemask_epi8, _mm_or_si128, _mm_set1_epi8,
    };

    use super::{Masks, BLOCK};

    #[inline]
    #[target_feature(enable = "sse2")]
    pub(super) fn classify<const CASED: bool>(block: &[u8; BLOCK]) -> Masks {
        let mut masks = Masks::default();
        for (i, part) in block.as_chunks::<16>().0.iter().enumerate() {
            // SAFETY: `part` is sixteen readable bytes, and the load asks for no alignment.
            let bytes = unsafe { _mm_loadu_si128(part.as_ptr().cast()) };
            let folded = _mm_or_si128(bytes, _mm_set1_epi8(0x20));
            let blank = equal(bytes, b' ');
            let at = |mask: __m128i| u64::from(_mm_movemask_epi8(mask) as u16) << (16 * i);
            masks.letter |= at(between(folded, b'a', b'z'));
            masks.number |= at(between(bytes, b'0', b'9'));
            masks.blank |= at(blank);
            masks.white |= at(_mm_or_si128(between(bytes, b'\t', b'\r'), blank));
            masks.newline |= at(_mm_or_si128(equal(bytes, b'\n'), equal(bytes, b'\r')));
            masks.quote |= at(equal(bytes, b'\''));
            masks.wide |= at(bytes);
            if CASED {
                masks.upper |= at(between(bytes, b'A', b'Z'));
                masks.slash |= at(equal(bytes, b'/'));
            }
        }
        masks
    }

    #[inline]
    #[target_feature(enable = "sse2")]
    pub(super) fn inner_bytes(block: &[u8; BLOCK]) -> u64 {
        let mut mask = 0;
        for (i, part) in block.as_chunks::<16>().0.iter().enumerate() {
            // SAFETY: as in `classify`.
            let bytes = unsafe { _mm_loadu_si128(part.as_ptr().cast()) };
            let inner = _mm_cmplt_epi8(bytes, _mm_set1_epi8(0xC0u8 as i8)); // as signed bytes
            mask |= u64::from(_mm_movemask_epi8(inner) as u16) << (16 * i);
        }
        mask
    }

    #[inline]
    #[target_feature(enable = "sse2")]
    fn equal(bytes: __m128i, b: u8) -> __m128i {
        _mm_cmpeq_epi8(bytes, _mm_set1_epi8(b as i8))
    }

    #[inline]
    #[target_feature(enable = "sse2")]
    fn between(bytes: __m128i, first: u8, last: u8) -> __m128i {
        let from_first = _mm_add_epi8(bytes, _mm_set1_epi8(first.wrapping_neg() as i8));
        let limit = _mm_set1_epi8((last - first) as i8);
        _mm_cmpeq_epi8(_mm_min_epu8(from_first, limit), from_first)
    }
}

#[cfg(any(test, not(target_arch = "x86_64")))]
mod swar {
    use super::{Masks, BLOCK};

    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = 0x8080_8080_8080_8080;

    #[inline(always)]
    pub(super) fn classify<const CASED: bool>(block: &[u8; BLOCK]) -> Masks {
        let mut masks = Masks::default();
        for (i, &part) in block.as_chunks::<8>().0.iter().enumerate() {
            let bytes = u64::from_le_bytes(part);
            let narrow = !bytes & HIGH; // the high bit of every byte that is ASCII
            let low = bytes & !HIGH; // seven bits a byte: sums below stay inside it
            let from = |first: u8| low + ONES * u64::from(0x80 - first);
            let between = |first: u8, last: u8| from(first) & !from(last + 1) & narrow;
            let equal = |b: u8| between(b, b);
            let at = |mask: u64| gather(mask) << (8 * i);
            let folded = low | (ONES * 0x20);
            let from = |first: u8| folded + ONES * u64::from(0x80 - first);
            masks.letter |= at(from(b'a') & !from(b'z' + 1) & narrow);
            masks.number |= at(between(b'0', b'9'));
            let blank = equal(b' ');
            masks.blank |= at(blank);
            masks.white |= at(between(b'\t', b'\r') | blank);
            masks.newline |= at(equal(b'\n') | equal(b'\r'));
            masks.quote |= at(equal(b'\''));
            masks.wide |= at(bytes & HIGH);
            if CASED {
                masks.upper |= at(between(b'A', b'Z'));
                masks.slash |= at(equal(b'/'));
            }
        }
        masks
    }

    #[inline(always)]
    pub(super) fn inner_bytes(block: &[u8; BLOCK]) -> u64 {
        let mut mask = 0;
        for (i, &part) in block.as_chunks::<8>().0.iter().enumerate() {
            let bytes = u64::from_le_bytes(part);
            mask |= gather(bytes & !(bytes << 1) & HIGH) << (8 * i);
        }
        mask
    }

    /// The high bits of eight bytes as eight neighbouring bits.
    #[inline(always)]
    fn gather(mask: u64) -> u64 {
        // Byte i holds the bit 8 i; the product moves it to bit 56 + i, and no
        // two of its terms meet.
        (mask >> 7 & ONES).wrapping_mul(0x0102_0408_1020_4080) >> 56
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(block: &[u8; BLOCK]) -> Masks {
        let mask = |is: &dyn Fn(u8) -> bool| {
            (0..BLOCK).fold(0, |mask, i| mask | u64::from(is(block[i])) << i)
        };
        Masks {
            letter: mask(&|b| b.is_ascii_alphabetic()),
            upper: mask(&|b| b.is_ascii_uppercase()),
            number: mask(&|b| b.is_ascii_digit()),
            white: mask(&|b| matches!(b, b'\t'..=b'\r' | b' ')),
            blank: mask(&|b| b == b' '),
            newline: mask(&|b| matches!(b, b'\r' | b'\n')),
            quote: mask(&|b| b == b'\''),
            slash: mask(&|b| b == b'/'),
            wide: mask(&|b| b >= 0x80),
        }
    }

    #[test]
    fn all_ways_agree_on_every_byte_at_every_place() {
        for first in 0..=255u8 {
            for step in [0, 1, 7, 37] {
                let block = std::array::from_fn(|i| first.wrapping_add((step * i) as u8));
                let expected = plain(&block);
                assert_eq!(classify::<true>(&block), expected);
                assert_eq!(swar::classify::<true>(&block), expected);
                let inner = (0..BLOCK).fold(0, |mask, i| {
                    mask | u64::from(matches!(block[i], 0x80..=0xBF)) << i
                });
                assert_eq!(inner_bytes(&block), inner);
                assert_eq!(swar::inner_bytes(&block), inner);
                let uncased = Masks {
                    upper: 0,
                    slash: 0,
                    ..expected
                };
                assert_eq!(classify::<false>(&block), uncased);
                assert_eq!(swar::classify::<false>(&block), uncased);
            }
        }
    }
}

//! The classes of 64 ASCII bytes as bit masks, one bit a byte.
//!
//! A [`Level`] is what a machine can do. [`Plain`] is what every machine of its
//! kind can: on x86-64 four times sixteen bytes are compared at once with SSE2,
//! elsewhere eight at a time in an ordinary u64. [`Avx2`] looks 32 bytes up in a
//! table at once; whoever runs it asks [`has_avx2`] first, and compiles all that
//! is around it for such machines too. All are tested equal to each other.
//!
//! Bytes of 0x80 and more are in `wide` and in no other mask; [`crate::blocks`]
//! looks at those characters one by one.

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

/// What a machine can do.
///
/// # Safety
///
/// The functions may only run where the machine has what the level is named for.
pub(crate) trait Level {
    /// The masks of one block; `upper` and `slash` are only there if `CASED`.
    unsafe fn classify<const CASED: bool>(block: &[u8; BLOCK]) -> Masks;

    /// Where a character goes on: the bytes 0x80 to 0xBF.
    unsafe fn inner_bytes(block: &[u8; BLOCK]) -> u64;
}

/// What every machine of this kind can do.
pub(crate) struct Plain;

impl Level for Plain {
    #[inline(always)]
    unsafe fn classify<const CASED: bool>(block: &[u8; BLOCK]) -> Masks {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: SSE2 is part of x86-64.
        return unsafe { sse2::classify::<CASED>(block) };
        #[cfg(not(target_arch = "x86_64"))]
        return swar::classify::<CASED>(block);
    }

    #[inline(always)]
    unsafe fn inner_bytes(block: &[u8; BLOCK]) -> u64 {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: SSE2 is part of x86-64.
        return unsafe { sse2::inner_bytes(block) };
        #[cfg(not(target_arch = "x86_64"))]
        return swar::inner_bytes(block);
    }
}

/// x86-64 of about 2013 and later: AVX2 and the bit instructions that came with it.
#[cfg(target_arch = "x86_64")]
pub(crate) struct Avx2;

#[cfg(target_arch = "x86_64")]
impl Level for Avx2 {
    #[inline(always)]
    unsafe fn classify<const CASED: bool>(block: &[u8; BLOCK]) -> Masks {
        // SAFETY: the caller knows that the machine has AVX2.
        unsafe { avx2::classify::<CASED>(block) }
    }

    #[inline(always)]
    unsafe fn inner_bytes(block: &[u8; BLOCK]) -> u64 {
        // SAFETY: the caller knows that the machine has AVX2.
        unsafe { avx2::inner_bytes(block) }
    }
}

/// Whether [`Avx2`] may run here; after the first call it costs a load.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("lzcnt")
        && is_x86_feature_detected!("popcnt")
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

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        __m256i, _mm256_and_si256, _mm256_cmpgt_epi8, _mm256_loadu_si256, _mm256_movemask_epi8,
        _mm256_or_si256, _mm256_set1_epi8, _mm256_setr_epi8, _mm256_shuffle_epi8,
        _mm256_slli_epi16, _mm256_srli_epi16,
    };

    use super::{Masks, BLOCK};

    // A class is a bit, and a rectangle of the ASCII table: the byte's upper and its lower four
    // bits both have it. Letters are two: those of the rows 4 and 6, and those of 5 and 7.
    const LETTER: u8 = 1 << 0;
    const LATE_LETTER: u8 = 1 << 1;
    const NUMBER: u8 = 1 << 2;
    const CONTROL: u8 = 1 << 3; // white space below U+0020
    const BLANK: u8 = 1 << 4;
    const NEWLINE: u8 = 1 << 5;
    const QUOTE: u8 = 1 << 6;
    const SLASH: u8 = 1 << 7;

    const UPPER_HALF: [u8; 16] = {
        let mut table = [0; 16];
        table[0] = CONTROL | NEWLINE;
        table[2] = BLANK | QUOTE | SLASH;
        table[3] = NUMBER;
        table[4] = LETTER;
        table[5] = LATE_LETTER;
        table[6] = LETTER;
        table[7] = LATE_LETTER;
        table
    };
    const LOWER_HALF: [u8; 16] = {
        let mut table = [0; 16];
        let mut low = 0;
        while low < 16 {
            let mut bits = 0;
            if low >= 1 {
                bits |= LETTER;
            }
            if low <= 0xA {
                bits |= LATE_LETTER;
            }
            if low <= 9 {
                bits |= NUMBER;
            }
            if low >= 9 && low <= 0xD {
                bits |= CONTROL;
            }
            if low == 0 {
                bits |= BLANK;
            }
            if low == 0xA || low == 0xD {
                bits |= NEWLINE;
            }
            if low == 7 {
                bits |= QUOTE;
            }
            if low == 0xF {
                bits |= SLASH;
            }
            table[low] = bits;
            low += 1;
        }
        table
    };

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn classify<const CASED: bool>(block: &[u8; BLOCK]) -> Masks {
        let mut masks = Masks::default();
        for (i, part) in block.as_chunks::<32>().0.iter().enumerate() {
            // SAFETY: `part` is 32 readable bytes, and the load asks for no alignment.
            let bytes = unsafe { _mm256_loadu_si256(part.as_ptr().cast()) };
            // The shuffle gives 0 for bytes of 0x80 and more.
            let upper = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), _mm256_set1_epi8(0x0F));
            let class = _mm256_and_si256(
                _mm256_shuffle_epi8(twice(&LOWER_HALF), bytes),
                _mm256_shuffle_epi8(twice(&UPPER_HALF), upper),
            );
            let at = |bit7: __m256i| u64::from(_mm256_movemask_epi8(bit7) as u32) << (32 * i);
            // Moving bits across bytes does no harm: only the highest of each byte counts.
            let number = _mm256_slli_epi16::<5>(class);
            let control = _mm256_slli_epi16::<4>(class);
            let blank = _mm256_slli_epi16::<3>(class);
            let late_letter = _mm256_slli_epi16::<6>(class);
            let letter = _mm256_or_si256(_mm256_slli_epi16::<7>(class), late_letter);
            masks.letter |= at(letter);
            masks.number |= at(number);
            masks.blank |= at(blank);
            masks.white |= at(_mm256_or_si256(control, blank));
            masks.newline |= at(_mm256_slli_epi16::<2>(class));
            masks.quote |= at(_mm256_slli_epi16::<1>(class));
            masks.wide |= at(bytes);
            if CASED {
                masks.upper |= at(letter) & !at(_mm256_slli_epi16::<2>(bytes));
                masks.slash |= at(class);
            }
        }
        masks
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn inner_bytes(block: &[u8; BLOCK]) -> u64 {
        let mut mask = 0;
        for (i, part) in block.as_chunks::<32>().0.iter().enumerate() {
            // SAFETY: as in `classify`.
            let bytes = unsafe { _mm256_loadu_si256(part.as_ptr().cast()) };
            let inner = _mm256_cmpgt_epi8(_mm256_set1_epi8(0xC0u8 as i8), bytes); // as signed bytes
            mask |= u64::from(_mm256_movemask_epi8(inner) as u32) << (32 * i);
        }
        mask
    }

    /// A table of sixteen bytes for each half of the register.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn twice(table: &[u8; 16]) -> __m256i {
        let t = table.map(|byte| byte as i8);
        _mm256_setr_epi8(
            t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8], t[9], t[10], t[11], t[12], t[13],
            t[14], t[15], t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8], t[9], t[10], t[11],
            t[12], t[13], t[14], t[15],
        )
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

    unsafe fn of_level<L: Level>(block: &[u8; BLOCK]) -> (Masks, Masks, u64) {
        // SAFETY: the caller asked the machine.
        unsafe {
            (
                L::classify::<true>(block),
                L::classify::<false>(block),
                L::inner_bytes(block),
            )
        }
    }

    #[test]
    fn all_ways_agree_on_every_byte_at_every_place() {
        for first in 0..=255u8 {
            for step in [0, 1, 7, 37] {
                let block = std::array::from_fn(|i| first.wrapping_add((step * i) as u8));
                let expected = plain(&block);
                let uncased = Masks {
                    upper: 0,
                    slash: 0,
                    ..expected
                };
                let inner = (0..BLOCK).fold(0, |mask, i| {
                    mask | u64::from(matches!(block[i], 0x80..=0xBF)) << i
                });
                // SAFETY: every machine has the first level.
                let plain = unsafe { of_level::<Plain>(&block) };
                assert_eq!(plain, (expected, uncased, inner));
                assert_eq!(swar::classify::<true>(&block), expected);
                assert_eq!(swar::classify::<false>(&block), uncased);
                assert_eq!(swar::inner_bytes(&block), inner);
                #[cfg(target_arch = "x86_64")]
                if has_avx2() {
                    // SAFETY: the machine has just been asked.
                    let avx2 = unsafe { of_level::<Avx2>(&block) };
                    assert_eq!(avx2, (expected, uncased, inner));
                }
            }
        }
    }
}

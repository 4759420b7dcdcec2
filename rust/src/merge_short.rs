//! Joining the bytes of a short piece: the way of nearly every piece that is met for the first time.
//!
//! After every merge all candidates are scanned for the lowest rank. Few bytes make that quick,
//! if nothing waits: which places are left is a word of bits, in which the neighbours of a place
//! are found by counting zeros; and the candidates are updated lane by lane, whatever the place,
//! so that they can stay in vector registers and no scan waits for a store.
//!
//! Called by `merge`, which takes its other ways for longer pieces. Never looks a piece up.

#[cfg(target_arch = "x86_64")]
use crate::masks::has_avx2;
use crate::merge::Merges;
use crate::pairs::{NONE, NOTHING};

/// Pieces of up to this many bytes are merged here: with a place before and one behind, 64.
pub(crate) const SHORT: usize = PLACES - 2;

/// Byte `i` is at place `i + 1`; before and behind the bytes is a token that joins with nothing.
const PLACES: usize = 64;
/// The bits of a place in a candidate, below its rank.
const PLACE_BITS: u32 = 7;
/// Most pieces have at most so many bytes.
const FEW: usize = 16;

/// Candidates: a rank and the place of its left token, which is one more than its lane.
trait Lanes {
    /// The smallest: the lowest rank, and of equals the leftmost.
    fn min(&self) -> u32;

    /// Puts each value at its place; the later one where two places are the same. There is no
    /// place 0 to put anything.
    fn set(&mut self, values: [(usize, u32); 3]);
}

impl Merges {
    /// Appends the ids of at most [`SHORT`] bytes.
    pub(crate) fn short(&self, piece: &[u8], out: &mut Vec<u32>) {
        #[cfg(target_arch = "x86_64")]
        if has_avx2() {
            // SAFETY: the machine has just been asked.
            return unsafe { self.short_avx2(piece, out) };
        }
        self.scan(piece, out, |first: [u32; PLACES]| first);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
    fn short_avx2(&self, piece: &[u8], out: &mut Vec<u32>) {
        // SAFETY: this function may only be called where the machine has it.
        unsafe {
            if piece.len() <= FEW {
                self.scan(piece, out, |first: [u32; FEW]| {
                    avx2::Vectors::<2>::new(first)
                });
            } else {
                self.scan(piece, out, |first: [u32; PLACES]| {
                    avx2::Vectors::<8>::new(first)
                });
            }
        }
    }

    #[inline(always)]
    fn scan<const N: usize, L: Lanes>(
        &self,
        piece: &[u8],
        out: &mut Vec<u32>,
        lanes: impl FnOnce([u32; N]) -> L,
    ) {
        let last = piece.len();
        assert!(last <= N.min(SHORT));
        let mut tokens = [NOTHING; PLACES];
        let mut alive: u64 = u64::MAX >> (PLACES - 2 - last); // the bytes and one on either side
        let mut candidates = [NONE; N];
        let mut before = None;
        for (i, &byte) in piece.iter().enumerate() {
            tokens[i + 1] = self.byte_id(byte);
            if let Some(before) = before {
                candidates[i - 1] = candidate(self.rank_of_bytes(before, byte), i);
            }
            before = Some(byte);
        }
        let mut candidates = lanes(candidates);
        loop {
            let best = candidates.min();
            if best == NONE {
                break;
            }
            let id = best >> PLACE_BITS;
            let place = best as usize % PLACES;
            let behind = alive & ((u64::MAX - 1) << place);
            let gone = behind.trailing_zeros() as usize % PLACES;
            let after = (behind & behind.wrapping_sub(1)).trailing_zeros() as usize % PLACES;
            let left = ((alive & ((1 << place) - 1)) | 1).ilog2() as usize;
            alive &= !(1 << gone);
            tokens[place] = id;
            let joined = candidate(self.rank(id, tokens[after]), place);
            let joined_left = candidate(self.rank(tokens[left], id), left);
            candidates.set([(gone, NONE), (place, joined), (left, joined_left)]);
        }
        let mut rest = alive & (u64::MAX >> (PLACES - 1 - last)) & !1;
        while rest != 0 {
            out.push(tokens[rest.trailing_zeros() as usize]);
            rest &= rest - 1;
        }
    }
}

impl<const N: usize> Lanes for [u32; N] {
    #[inline(always)]
    fn min(&self) -> u32 {
        self.iter().fold(NONE, |best, &next| best.min(next))
    }

    #[inline(always)]
    fn set(&mut self, values: [(usize, u32); 3]) {
        for (place, value) in values {
            if place > 0 {
                self[place - 1] = value;
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        __m256i, _mm256_add_epi32, _mm256_blendv_epi8, _mm256_castsi256_si128, _mm256_cmpeq_epi32,
        _mm256_extracti128_si256, _mm256_loadu_si256, _mm256_min_epu32, _mm256_set1_epi32,
        _mm256_setr_epi32, _mm_cvtsi128_si32, _mm_min_epu32, _mm_shuffle_epi32,
    };

    /// Eight lanes a vector.
    pub(super) struct Vectors<const V: usize>([__m256i; V]);

    impl<const V: usize> Vectors<V> {
        /// # Safety
        ///
        /// The machine has AVX2, and `N` is `8 * V`.
        #[inline(always)]
        pub(super) unsafe fn new<const N: usize>(first: [u32; N]) -> Vectors<V> {
            assert!(N == 8 * V);
            // SAFETY: there are eight numbers from each place on.
            Vectors(std::array::from_fn(|i| unsafe {
                _mm256_loadu_si256(first.as_ptr().add(8 * i).cast())
            }))
        }
    }

    impl<const V: usize> super::Lanes for Vectors<V> {
        #[inline(always)]
        fn min(&self) -> u32 {
            // SAFETY: who made `self` knows the machine.
            unsafe {
                let best = self.0[1..]
                    .iter()
                    .fold(self.0[0], |a, &b| _mm256_min_epu32(a, b));
                let (low, high) = (
                    _mm256_castsi256_si128(best),
                    _mm256_extracti128_si256(best, 1),
                );
                let best = _mm_min_epu32(low, high);
                let best = _mm_min_epu32(best, _mm_shuffle_epi32(best, 0b01_00_11_10));
                let best = _mm_min_epu32(best, _mm_shuffle_epi32(best, 0b10_11_00_01));
                _mm_cvtsi128_si32(best) as u32
            }
        }

        #[inline(always)]
        fn set(&mut self, values: [(usize, u32); 3]) {
            // SAFETY: who made `self` knows the machine.
            unsafe {
                let mut places = _mm256_setr_epi32(1, 2, 3, 4, 5, 6, 7, 8);
                for vector in &mut self.0 {
                    for (place, value) in values {
                        let here = _mm256_cmpeq_epi32(places, _mm256_set1_epi32(place as i32));
                        *vector =
                            _mm256_blendv_epi8(*vector, _mm256_set1_epi32(value as i32), here);
                    }
                    places = _mm256_add_epi32(places, _mm256_set1_epi32(8));
                }
            }
        }
    }
}

/// Orders by rank, then by place; NONE stays NONE.
#[inline(always)]
fn candidate(rank: u32, place: usize) -> u32 {
    if rank == NONE {
        NONE
    } else {
        rank << PLACE_BITS | place as u32
    }
}

//! Pieces in batches, between being cut and being looked up.
//!
//! Cutting mispredicts branches and looking up waits for memory; apart, neither
//! holds up the other. A [`Batch`] takes the next pieces from [`Ends`], makes
//! their keys and asks for the cache lines they need; `encode`, which calls
//! this, looks up the batch before it meanwhile. Nothing here knows an id.

use std::marker::PhantomData;

use crate::blocks::Blocks;
use crate::masks::Level;
use crate::split::Pieces;
use crate::words::{Cache, Key, KEY_BYTES, WIDE};

/// Pieces cut before they are looked up.
pub(crate) const BATCH: usize = 64;
/// A batch may get so many more, of its last block.
pub(crate) const FULL_BATCH: usize = BATCH + 64;
/// Where pieces end. (A closure would not be compiled for the machine's level.)
pub(crate) trait Ends {
    /// A place and bits, of which at least one is set: pieces end at the place plus each bit.
    fn next_ends(&mut self) -> Option<(usize, u64)>;
}

/// A block at a time, on a machine of level `L`.
pub(crate) struct BlockEnds<'a, L>(Blocks<'a>, PhantomData<L>);

impl<'a, L: Level> BlockEnds<'a, L> {
    /// # Safety
    ///
    /// The machine is of that level.
    #[inline(always)]
    pub(crate) unsafe fn new(blocks: Blocks<'a>) -> Self {
        BlockEnds(blocks, PhantomData)
    }
}

impl<L: Level> Ends for BlockEnds<'_, L> {
    #[inline(always)]
    fn next_ends(&mut self) -> Option<(usize, u64)> {
        // SAFETY: who made `self` knows the machine.
        unsafe { self.0.next_ends_at::<L>() }
    }
}

impl Ends for Pieces<'_> {
    #[inline(always)]
    fn next_ends(&mut self) -> Option<(usize, u64)> {
        self.next_end().map(|end| (end, 1))
    }
}

/// Pieces between cutting and looking up.
pub(crate) struct Batch {
    pub(crate) num: usize,
    pub(crate) bounds: [usize; FULL_BATCH + 16], // piece i is bytes[bounds[i]..bounds[i + 1]]
    pub(crate) keys: [(Key, u64); FULL_BATCH],
}

impl Batch {
    pub(crate) fn new() -> Batch {
        Batch {
            num: 0,
            bounds: [0; FULL_BATCH + 16],
            keys: [(Key::new(b""), 0); FULL_BATCH],
        }
    }

    #[inline(always)]
    pub(crate) fn piece<'a>(&self, i: usize, bytes: &'a [u8]) -> &'a [u8] {
        &bytes[self.bounds[i]..self.bounds[i + 1]]
    }

    /// Takes the next pieces, the first of which begins at `start`.
    #[inline(always)]
    pub(crate) fn cut(&mut self, start: usize, ends: &mut impl Ends) {
        self.bounds[0] = start;
        let mut num = 0;
        while num < BATCH {
            let Some((base, mut bits)) = ends.next_ends() else {
                break;
            };
            let end = num + bits.count_ones() as usize;
            // Fifteen at a time: few blocks have more. What is too much is
            // overwritten.
            while num < end {
                for bound in &mut self.bounds[num + 1..][..15] {
                    *bound = base + bits.trailing_zeros() as usize;
                    bits &= bits.wrapping_sub(1);
                }
                num += 15;
            }
            num = end;
        }
        self.num = num;
    }

    /// Makes the keys of all pieces and asks for the memory they will need.
    #[inline(always)]
    pub(crate) fn prepare(&mut self, bytes: &[u8], cache: &Cache) {
        let num = self.num.min(FULL_BATCH);
        let far_from_end = num > 0 && self.bounds[num - 1] + WIDE <= bytes.len();
        for i in 0..num {
            let (start, len) = (self.bounds[i], self.bounds[i + 1] - self.bounds[i]);
            let key = if len <= KEY_BYTES && far_from_end {
                // SAFETY: no piece of the batch begins later than the last.
                unsafe { Key::at(bytes, start, len) }
            } else {
                Key::of(&bytes[start..start + len])
            };
            let hash = key.hash();
            cache.prefetch(hash);
            self.keys[i] = (key, hash);
        }
    }
}

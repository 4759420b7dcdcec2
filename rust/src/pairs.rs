//! Which pairs of tokens join, and into which: a table that is asked without a single branch.
//!
//! While a piece is merged two pairs are looked up after every step, and most of them join with
//! nothing. Whatever a processor guesses there is often wrong, so nothing may depend on a guess:
//! every pair has one slot that it can be in, found through a displacement that its bucket got
//! when the table was built (hash, displace and compress: Belazzougui, Botelho and Dietzfelbinger,
//! ESA 2009). One load, one comparison.
//!
//! Built once by `merge` and only read after that. It knows nothing of bytes.

use std::collections::hash_map::RandomState;
use std::collections::HashSet;
use std::hash::BuildHasher;

/// Ids are packed into so many bits.
pub(crate) const ID_BITS: u32 = 21;
/// The last of them is no token: nothing joins with it.
pub(crate) const NOTHING: u32 = (1 << ID_BITS) - 1;
/// What a pair becomes that does not join.
pub(crate) const NONE: u32 = u32::MAX;

/// No key is that large.
const EMPTY: u64 = u64::MAX;
/// Pairs of a bucket, on average.
const BUCKET: usize = 4;
/// More of them are a bad hash (or somebody's wish to have one).
const MAX_BUCKET: usize = 64;
/// Hashes tried before giving up; the first is nearly always good.
const MAX_HASHES: u64 = 64;

/// Pairs of ids below [`NOTHING`] and what they become.
pub(crate) struct Pairs {
    multiplier: u64,
    bucket_shift: u32,
    displacements: Vec<u16>,
    slots: Vec<u64>, // left, right and id in one word
}

/// Why there is no table.
#[derive(Debug, PartialEq)]
pub(crate) enum Refused {
    /// The pair of this place was there before.
    Twice(usize),
    /// No hash tells the pairs apart.
    NoHash,
}

impl Pairs {
    /// A table of (left, right, id).
    pub(crate) fn new(pairs: &[(u32, u32, u32)]) -> Result<Pairs, Refused> {
        let mut known = HashSet::with_capacity(pairs.len());
        for (place, &(left, right, _)) in pairs.iter().enumerate() {
            if !known.insert((left, right)) {
                return Err(Refused::Twice(place));
            }
        }
        // Nobody can make a list of pairs that are bad for a multiplier not known beforehand.
        let random = RandomState::new();
        (0..MAX_HASHES)
            .find_map(|attempt| Pairs::try_new(pairs, random.hash_one(attempt) | 1, attempt))
            .ok_or(Refused::NoHash)
    }

    /// None if the pairs do not fit; there is more room at every further attempt.
    fn try_new(pairs: &[(u32, u32, u32)], multiplier: u64, attempt: u64) -> Option<Pairs> {
        let num_buckets = (pairs.len() / BUCKET).next_power_of_two().max(2);
        let num_slots = (pairs.len() * 5 / 4 + 64) * (8 + attempt as usize) / 8;
        let mut table = Pairs {
            multiplier,
            bucket_shift: u64::BITS - num_buckets.trailing_zeros(),
            displacements: vec![0; num_buckets],
            slots: vec![EMPTY; num_slots],
        };
        let mut buckets: Vec<Vec<usize>> = vec![Vec::new(); num_buckets];
        for (place, &(left, right, _)) in pairs.iter().enumerate() {
            let bucket = &mut buckets[table.bucket(table.hash(key(left, right)))];
            bucket.push(place);
            if bucket.len() > MAX_BUCKET {
                return None;
            }
        }
        // The fullest first, while there is most room.
        let mut order: Vec<usize> = (0..num_buckets).collect();
        order.sort_by_key(|&bucket| std::cmp::Reverse(buckets[bucket].len()));
        let mut taken = Vec::with_capacity(MAX_BUCKET);
        for bucket in order {
            let mut fits = |displacement: u16| {
                taken.clear();
                for &place in &buckets[bucket] {
                    let (left, right, _) = pairs[place];
                    let slot = table.slot(table.hash(key(left, right)), displacement);
                    if table.slots[slot] != EMPTY || taken.contains(&slot) {
                        return false;
                    }
                    taken.push(slot);
                }
                true
            };
            let displacement = (0..=u16::MAX).find(|&d| fits(d))?;
            table.displacements[bucket] = displacement;
            for (&slot, &place) in taken.iter().zip(&buckets[bucket]) {
                let (left, right, id) = pairs[place];
                table.slots[slot] = key(left, right) << ID_BITS | u64::from(id);
            }
        }
        Some(table)
    }

    #[inline(always)]
    fn hash(&self, key: u64) -> u64 {
        key.wrapping_mul(self.multiplier)
    }

    #[inline(always)]
    fn bucket(&self, hash: u64) -> usize {
        (hash >> self.bucket_shift) as usize
    }

    #[inline(always)]
    fn slot(&self, hash: u64, displacement: u16) -> usize {
        let displaced = (hash >> 20) as u32 ^ u32::from(displacement);
        let spread = u64::from(displaced.wrapping_mul(0x9E37_79B1)); // 2^32 over the golden ratio
        ((spread * self.slots.len() as u64) >> 32) as usize
    }

    /// The id that two neighbours become, or [`NONE`].
    #[inline(always)]
    pub(crate) fn get(&self, left: u32, right: u32) -> u32 {
        let key = key(left, right);
        let hash = self.hash(key);
        let entry = self.slots[self.slot(hash, self.displacements[self.bucket(hash)])];
        if entry >> ID_BITS == key {
            entry as u32 & NOTHING
        } else {
            NONE
        }
    }
}

#[inline(always)]
fn key(left: u32, right: u32) -> u64 {
    u64::from(left) << ID_BITS | u64::from(right)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn finds_what_a_map_finds(
            pairs in prop::collection::hash_map((0u32..300, 0u32..300), 0..NOTHING, 0..2000),
        ) {
            let list: Vec<_> = pairs.iter().map(|(&(l, r), &id)| (l, r, id)).collect();
            let table = Pairs::new(&list).unwrap();
            for left in 0..300 {
                for right in (0..300).chain([NOTHING]) {
                    let expected = pairs.get(&(left, right)).copied().unwrap_or(NONE);
                    prop_assert_eq!(table.get(left, right), expected);
                }
            }
        }
    }

    #[test]
    fn holds_many_pairs_of_large_ids() {
        let pairs: HashMap<(u32, u32), u32> = (0..200_000u32)
            .map(|i| {
                (
                    (NOTHING - 1 - i * 7, i.wrapping_mul(2_654_435_761) >> 12),
                    i,
                )
            })
            .collect();
        let list: Vec<_> = pairs.iter().map(|(&(l, r), &id)| (l, r, id)).collect();
        let table = Pairs::new(&list).unwrap();
        for (&(left, right), &id) in &pairs {
            assert_eq!(table.get(left, right), id);
            assert_eq!(
                table.get(right, left),
                pairs.get(&(right, left)).copied().unwrap_or(NONE)
            );
        }
    }

    #[test]
    fn says_which_pair_is_there_twice() {
        let twice = [(1, 2, 3), (2, 1, 4), (1, 2, 5)];
        assert_eq!(Pairs::new(&twice).err(), Some(Refused::Twice(2)));
        assert_eq!(Pairs::new(&[]).unwrap().get(1, 2), NONE);
    }
}

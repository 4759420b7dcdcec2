//! Learning merges: join the most frequent pair of neighbouring tokens again and again.
//!
//! [`learn`] starts from counted pieces (see [`crate::Counter`]). All pieces lie one after the
//! other in one array with a slot for each byte. A token of several bytes has its id in its first
//! and in its last slot, so both neighbours of a token are found without links, and a merge writes
//! two slots. For every pair there is its count and the list of its places; the merge of `(a, b)`
//! walks over the places of `(a, b)` and nothing else, so that a piece of a million letters costs
//! what a million letters in words cost.
//!
//! Two things keep it small. A pair's count only ever falls once the pair exists, so pairs below a
//! *floor* cannot win before all others have fallen below it too: they are not kept at all. Should
//! the winner come below the floor, the floor is lowered and the pairs are found anew from the
//! array. And the places in a pair's list may be out of date; the array says so.
//!
//! Ties: the highest count wins; among equals the smaller pair of ids `(left, right)`. A pair
//! inside `aaa` counts at each of its places. The result depends on nothing but the counts.

use std::collections::BinaryHeap;

use crate::count::Counter;
use crate::error::{Error, ErrorKind};
use crate::split::Pattern;
use crate::table::PieceCounts;
use crate::FIRST_MERGE_ID;

type Pair = (u32, u32);

/// Trains merges on `texts` in one call; see [`Counter`] and [`learn`].
///
/// Fails where the memory of the counter is used up and its temporary files fail, or where
/// [`learn`] does.
pub fn train<'a>(
    texts: impl IntoIterator<Item = &'a str>,
    num_merges: usize,
    pattern: Pattern,
    threads: usize,
) -> Result<Vec<Pair>, Error> {
    let mut counter = Counter::new(pattern, threads);
    let texts: Vec<&str> = texts.into_iter().collect();
    counter.add(&texts)?;
    learn(&counter.finish()?, num_merges)
}

/// The first `num_merges` merges of the pieces, best first.
///
/// Fewer come back when the pieces hold no further pair. Fails with [`ErrorKind::TooLarge`] where
/// the distinct pieces together have more than 4 billion bytes.
pub fn learn(pieces: &PieceCounts, num_merges: usize) -> Result<Vec<Pair>, Error> {
    learn_until(pieces, num_merges, &mut |_| false)
}

/// [`learn`] that asks `stop` several times a second with the number of merges so far; true stops
/// it, with [`ErrorKind::Cancelled`].
pub fn learn_until(
    pieces: &PieceCounts,
    num_merges: usize,
    stop: &mut dyn FnMut(usize) -> bool,
) -> Result<Vec<Pair>, Error> {
    let mut learner = Learner::new(pieces, num_merges)?;
    let mut merges: Vec<Pair> = Vec::new();
    while merges.len() < num_merges {
        if learner.work >= WORK_BETWEEN_STOPS {
            learner.work = 0;
            if stop(merges.len()) {
                return Err(Error::new(
                    ErrorKind::Cancelled,
                    "learning merges was stopped",
                ));
            }
        }
        let Some(pair) = learner.best() else {
            if learner.floor == 1 {
                break;
            }
            learner.find_pairs(learner.floor / FLOOR_STEP);
            continue;
        };
        learner.merge(pair, FIRST_MERGE_ID + merges.len() as u32);
        merges.push(pair);
    }
    Ok(merges)
}

/// In units of one place looked at: a few milliseconds.
const WORK_BETWEEN_STOPS: usize = 1 << 18;
/// The first floor is the average count of a merge's places, had all merges equal shares of the
/// corpus, divided by this. Chosen so that 32,512 merges of English need no second floor.
const FLOOR_SHARE: u64 = 16;
const FLOOR_STEP: u64 = 16;

/// Ids stay below 2^31: `events` keeps one bit beside them.
const MAX_MERGES: usize = 1 << 30;

/// Between two pieces.
const BORDER: u32 = u32::MAX;
/// The first slot of a token that is now the second half of another.
const DEAD: u32 = u32::MAX - 1;
const NONE: u32 = u32::MAX;

/// One place of a pair: the first slot of its left token, and its piece.
#[derive(Clone, Copy)]
struct Place {
    slot: u32,
    piece: u32,
}

/// A pair that may still win.
#[derive(Clone, Copy, Default)]
struct PairInfo {
    key: u64, // left id << 32 | right id; FREE in the hash table if there is none
    count: u64,
    first_place: usize,
    num_places: u32,
}

/// What one merge does to the pairs of one neighbouring token.
#[derive(Clone, Copy)]
struct Change {
    lost: u64,   // from the count of the old pair
    gained: u64, // the count of the new pair
    num_places: u32,
    next_place: u32, // where in `places` the next one goes, from `first_place` of the merge on
}

const NO_CHANGE: Change = Change {
    lost: 0,
    gained: 0,
    num_places: 0,
    next_place: NONE,
};

struct Learner {
    slots: Vec<u32>,
    counts: Vec<u64>,  // by piece
    lengths: Vec<u32>, // bytes by token
    pairs: PairTable,
    places: Vec<Place>,
    heap: BinaryHeap<u128>, // count << 64 | !key; the count may be out of date, that is, too high
    floor: u64,
    work: usize,
    // What follows is only used inside `merge`.
    left: Vec<Change>, // by token
    right: Vec<Change>,
    left_touched: Vec<u32>,
    right_touched: Vec<u32>,
    events: Vec<(u32, Place)>, // neighbour << 1 | 1 if it is on the right
}

impl Learner {
    fn new(pieces: &PieceCounts, num_merges: usize) -> Result<Learner, Error> {
        let useful = || {
            pieces
                .iter()
                .filter(|(piece, count)| piece.len() > 1 && *count > 0)
        };
        let num_slots = useful().map(|(piece, _)| piece.len() + 1).sum::<usize>() + 1;
        if num_slots >= DEAD as usize || num_merges >= MAX_MERGES {
            let message =
                format!("{num_slots} bytes of distinct pieces are too many to learn from");
            return Err(Error::new(ErrorKind::TooLarge, message));
        }
        let mut slots = Vec::with_capacity(num_slots);
        let mut counts = Vec::with_capacity(pieces.len());
        let mut total = 0u64;
        slots.push(BORDER);
        for (piece, count) in useful() {
            slots.extend(piece.iter().map(|&byte| u32::from(byte)));
            slots.push(BORDER);
            counts.push(count);
            total = total.saturating_add(count);
        }
        let mut learner = Learner {
            slots,
            counts,
            lengths: vec![1; FIRST_MERGE_ID as usize],
            pairs: PairTable::default(),
            places: Vec::new(),
            heap: BinaryHeap::new(),
            floor: 1,
            work: 0,
            left: vec![NO_CHANGE; FIRST_MERGE_ID as usize],
            right: vec![NO_CHANGE; FIRST_MERGE_ID as usize],
            left_touched: Vec::new(),
            right_touched: Vec::new(),
            events: Vec::new(),
        };
        learner.find_pairs(total / (num_merges as u64).saturating_mul(FLOOR_SHARE).max(1));
        Ok(learner)
    }

    /// Counts all pairs anew and keeps those with at least `floor`, which is at least 1.
    fn find_pairs(&mut self, floor: u64) {
        self.floor = floor.max(1);
        self.pairs = PairTable::default();
        self.heap.clear();
        let (slots, lengths) = (&self.slots, &self.lengths);
        for_each_pair(slots, lengths, |key, place| {
            let info = self.pairs.entry(key);
            info.count += self.counts[place.piece as usize];
            info.num_places += 1;
        });
        let mut num_places = 0;
        for info in self.pairs.all_mut() {
            if info.count < self.floor {
                info.count = 0;
                continue;
            }
            info.first_place = num_places;
            num_places += info.num_places as usize;
            info.num_places = 0;
            self.heap.push(heap_entry(info.count, info.key));
        }
        let nowhere = Place { slot: 0, piece: 0 };
        self.places.clear();
        self.places.resize(num_places, nowhere);
        for_each_pair(slots, lengths, |key, place| {
            let info = self.pairs.entry(key);
            if info.count > 0 {
                self.places[info.first_place + info.num_places as usize] = place;
                info.num_places += 1;
            }
        });
        self.pairs.retain_counted();
        self.work += self.slots.len() / 4;
    }

    /// The pair to merge next, if one has at least the floor.
    fn best(&mut self) -> Option<Pair> {
        while let Some(top) = self.heap.pop() {
            let (count, key) = ((top >> 64) as u64, !(top as u64));
            let now = self.pairs.get(key).map_or(0, |info| info.count);
            if now == count {
                return Some(((key >> 32) as u32, key as u32));
            }
            if now >= self.floor {
                self.heap.push(heap_entry(now, key));
            }
        }
        None
    }

    /// Joins every `pair` to the token `id`, from the left in each piece.
    fn merge(&mut self, pair: Pair, id: u32) {
        let info = self
            .pairs
            .get(key_of(pair))
            .expect("the best pair is known");
        let (first_place, num_places) = (info.first_place, info.num_places as usize);
        info.count = 0;
        let (left_len, right_len) = (self.lengths[pair.0 as usize], self.lengths[pair.1 as usize]);
        self.lengths.push(left_len + right_len);
        self.left.push(NO_CHANGE);
        self.right.push(NO_CHANGE);
        for i in first_place..first_place + num_places {
            let place = self.places[i];
            let start = place.slot as usize;
            let second = start + left_len as usize;
            if self.slots[start] != pair.0 || self.slots[second] != pair.1 {
                continue;
            }
            let last = second + right_len as usize - 1;
            let before = self.slots[start - 1];
            let after = self.slots[last + 1];
            self.slots[second] = DEAD;
            self.slots[start] = id;
            self.slots[last] = id;
            let count = self.counts[place.piece as usize];
            if before != BORDER {
                let change = &mut self.left[before as usize];
                if change.num_places == 0 {
                    self.left_touched.push(before);
                }
                change.num_places += 1;
                change.gained += count;
                if before == id {
                    // Just made, with the left token of this place to its right.
                    self.right[pair.0 as usize].gained -= count;
                } else {
                    change.lost += count;
                }
                let slot = place.slot - self.lengths[before as usize];
                self.events.push((before << 1, Place { slot, ..place }));
            }
            if after != BORDER {
                let change = &mut self.right[after as usize];
                if change.num_places == 0 {
                    self.right_touched.push(after);
                }
                change.num_places += 1;
                change.gained += count;
                change.lost += count;
                self.events.push((after << 1 | 1, place));
            }
        }
        self.work += num_places + self.events.len();
        self.settle(pair, id);
    }

    /// Brings what a merge changed into the pairs, and clears it.
    fn settle(&mut self, pair: Pair, id: u32) {
        let first_place = self.places.len();
        let mut num_places = 0;
        for (touched, changes, is_right) in [
            (&mut self.left_touched, &mut self.left, false),
            (&mut self.right_touched, &mut self.right, true),
        ] {
            for &token in touched.iter() {
                let change = &mut changes[token as usize];
                let (old, new) = if is_right {
                    ((pair.1, token), (id, token))
                } else {
                    ((token, pair.0), (token, id))
                };
                // The merged pair itself has count 0 already (it is its own neighbour in "aaa").
                if change.lost > 0 && old != pair {
                    if let Some(info) = self.pairs.get(key_of(old)) {
                        info.count -= change.lost;
                    }
                }
                if change.gained >= self.floor {
                    let info = self.pairs.entry(key_of(new));
                    info.count = change.gained;
                    info.first_place = first_place + num_places as usize;
                    info.num_places = change.num_places;
                    change.next_place = num_places;
                    num_places += change.num_places;
                    self.heap.push(heap_entry(info.count, info.key));
                }
            }
        }
        let nowhere = Place { slot: 0, piece: 0 };
        self.places
            .resize(first_place + num_places as usize, nowhere);
        for (neighbour, place) in self.events.drain(..) {
            let changes = if neighbour & 1 == 0 {
                &mut self.left
            } else {
                &mut self.right
            };
            let change = &mut changes[neighbour as usize >> 1];
            if change.next_place != NONE {
                self.places[first_place + change.next_place as usize] = place;
                change.next_place += 1;
            }
        }
        for token in self.left_touched.drain(..) {
            self.left[token as usize] = NO_CHANGE;
        }
        for token in self.right_touched.drain(..) {
            self.right[token as usize] = NO_CHANGE;
        }
    }
}

/// Calls `f` with the key and the place of every pair, piece by piece, from the left.
fn for_each_pair(slots: &[u32], lengths: &[u32], mut f: impl FnMut(u64, Place)) {
    let mut piece = 0;
    let mut at = 1;
    while at < slots.len() {
        let mut left = slots[at];
        while left != BORDER {
            let next = at + lengths[left as usize] as usize;
            let right = slots[next];
            if right != BORDER {
                let slot = at as u32;
                f(key_of((left, right)), Place { slot, piece });
            }
            at = next;
            left = right;
        }
        piece += 1;
        at += 1;
    }
}

#[inline(always)]
fn key_of(pair: Pair) -> u64 {
    u64::from(pair.0) << 32 | u64::from(pair.1)
}

/// The heap's largest entry has the highest count, and of those the smallest pair.
#[inline(always)]
fn heap_entry(count: u64, key: u64) -> u128 {
    u128::from(count) << 64 | u128::from(!key)
}

/// Pairs by key; open addressing, at most half full.
struct PairTable {
    slots: Vec<PairInfo>,
    shift: u32,
    len: usize,
}

const FREE: u64 = u64::MAX; // no pair: both halves would be BORDER
const FREE_SLOT: PairInfo = PairInfo {
    key: FREE,
    count: 0,
    first_place: 0,
    num_places: 0,
};

impl Default for PairTable {
    fn default() -> Self {
        PairTable::with_slots(1 << 12)
    }
}

impl PairTable {
    fn with_slots(num_slots: usize) -> PairTable {
        PairTable {
            slots: vec![FREE_SLOT; num_slots],
            shift: 64 - num_slots.ilog2(),
            len: 0,
        }
    }

    /// Where `key` is, or the free slot where it would be.
    #[inline(always)]
    fn find(&self, key: u64) -> usize {
        let hash = (key ^ key >> 32).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mut at = (hash >> self.shift) as usize;
        while self.slots[at].key != key && self.slots[at].key != FREE {
            at = (at + 1) & (self.slots.len() - 1);
        }
        at
    }

    #[inline(always)]
    fn get(&mut self, key: u64) -> Option<&mut PairInfo> {
        let at = self.find(key);
        let info = &mut self.slots[at];
        (info.key == key).then_some(info)
    }

    #[inline(always)]
    fn entry(&mut self, key: u64) -> &mut PairInfo {
        let mut at = self.find(key);
        if self.slots[at].key == FREE {
            if self.len * 2 >= self.slots.len() {
                self.rebuild(self.slots.len() * 2);
                at = self.find(key);
            }
            self.len += 1;
            self.slots[at].key = key;
        }
        &mut self.slots[at]
    }

    fn all_mut(&mut self) -> impl Iterator<Item = &mut PairInfo> {
        self.slots.iter_mut().filter(|info| info.key != FREE)
    }

    /// Forgets the pairs whose count is 0.
    fn retain_counted(&mut self) {
        for info in &mut self.slots {
            if info.count == 0 {
                info.key = FREE;
            }
        }
        self.rebuild(self.slots.len());
    }

    #[cold]
    fn rebuild(&mut self, num_slots: usize) {
        let old = std::mem::replace(self, PairTable::with_slots(num_slots));
        for info in old.slots {
            if info.key != FREE {
                let at = self.find(info.key);
                self.slots[at] = info;
                self.len += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merges(texts: &[&str], n: usize) -> Vec<Pair> {
        train(texts.iter().copied(), n, Pattern::Qwen2, 1).unwrap()
    }

    #[test]
    fn ties_go_to_the_smaller_pair() {
        assert_eq!(merges(&["ab", "cd"], 2), [(97, 98), (99, 100)]);
    }

    #[test]
    fn stops_when_nothing_is_left() {
        assert_eq!(merges(&["abc"], 10).len(), 2);
        assert!(merges(&[], 10).is_empty());
        assert!(merges(&["abc"], 0).is_empty());
    }

    #[test]
    fn repeated_letters() {
        assert_eq!(merges(&["aaaaaaaaa"], 3), [(97, 97), (256, 256), (257, 97)]);
    }

    #[test]
    fn a_floor_changes_nothing() {
        let text = "the cat that sat on the mat ate a fat rat and that was that ".repeat(40);
        let mut counter = Counter::new(Pattern::Qwen2, 1);
        counter.add(&[text]).unwrap();
        let pieces = counter.finish().unwrap();
        let all = learn(&pieces, 100).unwrap();
        for n in 0..all.len() {
            assert_eq!(learn(&pieces, n).unwrap(), all[..n]);
        }
    }

    #[test]
    fn a_long_piece_is_not_quadratic() {
        let text = "a".repeat(1 << 20) + " " + &"ab".repeat(1 << 19);
        assert_eq!(merges(&[&text], 40).len(), 40);
    }

    #[test]
    fn stops_when_told() {
        let mut counter = Counter::new(Pattern::Qwen2, 2);
        counter.add(&["a b c ".repeat(1000)]).unwrap();
        let long = "ab".repeat(1 << 20);
        let error = counter.add_until(&[&long], &mut |_| true).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled);
        assert!(counter.is_incomplete());
        assert_eq!(counter.finish().unwrap_err().kind(), ErrorKind::Cancelled);
        let mut pieces = PieceCounts::default();
        pieces.push(long.as_bytes(), 1);
        let error = learn_until(&pieces, 9, &mut |_| true).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled);
    }
}

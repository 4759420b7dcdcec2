//! Joining the bytes of one piece: the exact rule, and why it is never slow.
//!
//! [`Merges`] holds the pairs that join and what they become. Three ways lead
//! to the same ids:
//!
//! * [`Merges::short`] scans for the lowest rank after every merge; quick for a
//!   few dozen bytes;
//! * [`Merges::heap`] keeps candidates in a heap: `O(n log n)` for any length;
//! * [`Merges::windows`] encodes a long piece through short windows that
//!   overlap. A sequence of tokens is what BPE gives exactly if every two
//!   neighbours are what BPE gives for their joined bytes: ranks rise while a
//!   token is built, so what happens at a border depends on the two tokens that
//!   meet there and on nothing else. Two windows that agree on one token may
//!   therefore be joined at it. Windows that do not agree are doubled.
//!
//! Before any of them [`Merges::first_part`] cuts a piece between two bytes that are
//! neighbours in no token, which no merge can cross.
//!
//! Called by `encode`, which looks pieces up before it merges them. Never
//! keeps results: that is the business of `words`.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::decode::Tokens;
use crate::error::{Error, ErrorKind};

/// Ids are packed into 21 bits, and the last of them means nothing.
pub(crate) const MAX_TOKENS: usize = (1 << 21) - 1;
/// No token: the rank of a pair that does not join, and a token that is gone.
const NONE: u32 = u32::MAX;
/// Pieces up to this many bytes are merged by scanning, longer ones by a heap.
pub(crate) const SHORT: usize = 64;
/// The window with which a long piece begins.
const WINDOW: usize = 48;

/// A token that joins with nothing.
const NOTHING: u32 = ID_MASK as u32;
/// Places 0 to 65 of a short piece.
const PLACE_BITS: u32 = 7;

const EMPTY: u64 = u64::MAX;
const ID_BITS: u32 = 21;
const ID_MASK: u64 = (1 << ID_BITS) - 1;

/// Which pairs join, and into which id. A lower id joins earlier.
pub(crate) struct Merges {
    byte_ids: [u32; 256],
    /// What two single bytes become: most lookups are of such pairs.
    byte_pairs: Vec<u32>,
    /// Open addressing: left, right and id in one word, at most half full.
    pairs: Vec<u64>,
    shift: u32,
    /// A bit for every pair, by its hash: most lookups end here, in memory
    /// that fits the first cache.
    filter: Vec<u64>,
    /// Bit `b` of `neighbours[a]`: some token holds byte `a` right before `b`.
    neighbours: Vec<[u64; 4]>,
    /// Ranks rise while a token is built, so that windows are exact.
    ordered: bool,
}

impl Merges {
    /// `pairs` are (left, right, id); `tokens` the bytes of every id.
    ///
    /// `ordered` promises that no pair holds an id above the one it makes, or
    /// at least that such a pair never meets. Fails if a pair occurs twice.
    pub(crate) fn new(
        byte_ids: [u32; 256],
        pairs: &[(u32, u32, u32)],
        tokens: &Tokens,
        ordered: bool,
    ) -> Result<Merges, Error> {
        let slots = (pairs.len() * 2).next_power_of_two().max(64);
        let mut merges = Merges {
            byte_ids,
            byte_pairs: vec![NONE; 1 << 16],
            pairs: vec![EMPTY; slots],
            shift: 64 - slots.trailing_zeros(),
            filter: vec![0; (slots / 16).max(1)],
            neighbours: vec![[0; 4]; 256],
            ordered,
        };
        for (i, &(left, right, id)) in pairs.iter().enumerate() {
            let key = u64::from(left) << ID_BITS | u64::from(right);
            if merges.rank(left, right) != NONE {
                let message = format!("merge {i} {:?} occurs twice", (left, right));
                return Err(Error::new(ErrorKind::InvalidMerges, message));
            }
            let hash = Merges::hash(key);
            let (word, bit) = merges.filter_bit(hash);
            merges.filter[word] |= 1 << bit;
            let mut slot = (hash >> merges.shift) as usize;
            while merges.pairs[slot] != EMPTY {
                // The neighbour first, then the next two.
                let other = slot ^ 1;
                slot = if merges.pairs[other] == EMPTY {
                    other
                } else {
                    (slot + 2) & (slots - 1)
                };
            }
            merges.pairs[slot] = key << ID_BITS | u64::from(id);
        }
        for a in 0..=255u8 {
            for b in 0..=255u8 {
                let (left, right) = (byte_ids[usize::from(a)], byte_ids[usize::from(b)]);
                merges.byte_pairs[byte_pair(a, b)] = merges.rank(left, right);
            }
        }
        for id in 0..tokens.len() as u32 {
            for pair in tokens.get(id).windows(2) {
                let row = &mut merges.neighbours[usize::from(pair[0])];
                row[usize::from(pair[1] >> 6)] |= 1 << (pair[1] & 63);
            }
        }
        Ok(merges)
    }

    /// Whether windows are exact, so that a part may be looked up like a piece.
    pub(crate) fn is_ordered(&self) -> bool {
        self.ordered
    }

    /// The id of a single byte.
    pub(crate) fn byte_id(&self, byte: u8) -> u32 {
        self.byte_ids[usize::from(byte)]
    }

    #[inline(always)]
    fn hash(key: u64) -> u64 {
        key.wrapping_mul(0x9E37_79B9_7F4A_7C15)
    }

    /// The word of the filter and the bit in it.
    #[inline(always)]
    fn filter_bit(&self, hash: u64) -> (usize, u32) {
        let word = (hash >> 20) as usize & (self.filter.len() - 1);
        (word, (hash >> 14) as u32 & 63)
    }

    /// The id that two neighbours become, or NONE.
    #[inline(always)]
    fn rank(&self, left: u32, right: u32) -> u32 {
        let key = u64::from(left) << ID_BITS | u64::from(right);
        let hash = Merges::hash(key);
        let (word, bit) = self.filter_bit(hash);
        if self.filter[word] >> bit & 1 == 0 {
            return NONE;
        }
        let mut slot = (hash >> self.shift) as usize;
        loop {
            // Two slots at a time, without a branch between them.
            let first = self.pairs[slot];
            let second = self.pairs[slot ^ 1];
            let mut found = NONE;
            if first >> ID_BITS == key {
                found = (first & ID_MASK) as u32;
            }
            if second >> ID_BITS == key {
                found = (second & ID_MASK) as u32;
            }
            if found != NONE || first == EMPTY || second == EMPTY {
                return found;
            }
            slot = (slot + 2) & (self.pairs.len() - 1);
        }
    }

    /// The length of the first part of `piece`: no merge joins it to the rest.
    #[inline]
    pub(crate) fn first_part(&self, piece: &[u8]) -> usize {
        for (i, pair) in piece.windows(2).enumerate() {
            let row = &self.neighbours[usize::from(pair[0])];
            if row[usize::from(pair[1] >> 6)] >> (pair[1] & 63) & 1 == 0 {
                return i + 1;
            }
        }
        piece.len()
    }

    /// Appends the ids of one piece, by the way that suits its length.
    pub(crate) fn piece(&self, piece: &[u8], out: &mut Vec<u32>) {
        if piece.len() <= SHORT {
            self.short(piece, out);
        } else {
            self.heap(piece, out);
        }
    }

    /// Appends the ids of at most [`SHORT`] bytes.
    pub(crate) fn short(&self, piece: &[u8], out: &mut Vec<u32>) {
        if piece.len() <= 16 {
            self.scan::<16, 18>(piece, out);
        } else {
            self.scan::<SHORT, { SHORT + 2 }>(piece, out);
        }
    }

    /// Merges in a linked list of places: byte `i` is at place `i + 1`, and the
    /// places before and behind hold a token that joins with nothing.
    ///
    /// Written without branches that depend on the text, where it can be.
    #[inline(always)]
    fn scan<const N: usize, const PLACES: usize>(&self, piece: &[u8], out: &mut Vec<u32>) {
        let last = piece.len();
        assert!(last <= N && PLACES == N + 2);
        let mut tokens = [NOTHING; PLACES];
        let mut next = [0u8; PLACES];
        let mut previous = [0u8; PLACES];
        // A rank and the place of its left token: the smallest is the next to
        // be joined, the leftmost among equals.
        let mut candidates = [NONE; N];
        let mut before = None;
        for (i, &byte) in piece.iter().enumerate() {
            tokens[i + 1] = self.byte_id(byte);
            next[i + 1] = i as u8 + 2;
            previous[i + 1] = i as u8;
            if let Some(before) = before {
                let rank = self.byte_pairs[byte_pair(before, byte)];
                candidates[i - 1] = candidate(rank, i as u32);
            }
            before = Some(byte);
        }
        loop {
            let mut best = NONE;
            for &candidate in &candidates[..last] {
                best = best.min(candidate);
            }
            if best == NONE {
                break;
            }
            let place = (best & ((1 << PLACE_BITS) - 1)) as usize % PLACES;
            let id = best >> PLACE_BITS;
            let gone = usize::from(next[place]) % PLACES;
            let after = usize::from(next[gone]) % PLACES;
            let left = usize::from(previous[place]) % PLACES;
            tokens[place] = id;
            tokens[gone] = NOTHING;
            candidates[(gone - 1) % N] = NONE;
            next[place] = after as u8;
            previous[after] = place as u8;
            let rank = self.rank(id, tokens[after]);
            candidates[(place - 1) % N] = candidate(rank, place as u32);
            if left > 0 {
                let rank = self.rank(tokens[left], id);
                candidates[(left - 1) % N] = candidate(rank, left as u32);
            }
        }
        let mut place = 1;
        while place <= last {
            out.push(tokens[place]);
            place = usize::from(next[place]);
        }
    }

    /// A linked list of tokens and a heap of candidate merges: O(n log n).
    pub(crate) fn heap(&self, piece: &[u8], out: &mut Vec<u32>) {
        self.heap_below(NONE, piece, out);
    }

    /// The same with the merges of lower rank than `limit` only.
    pub(crate) fn heap_below(&self, limit: u32, piece: &[u8], out: &mut Vec<u32>) {
        let len = piece.len();
        assert!(len < NONE as usize, "a piece of 4 GiB");
        let mut tokens: Vec<u32> = piece.iter().map(|&b| self.byte_id(b)).collect();
        let mut next: Vec<u32> = (1..=len as u32).collect();
        let mut previous: Vec<u32> = (0..len as u32).map(|i| i.wrapping_sub(1)).collect();
        let mut first = Vec::with_capacity(len);
        for (i, pair) in piece.windows(2).enumerate() {
            let rank = self.byte_pairs[byte_pair(pair[0], pair[1])];
            if rank != NONE {
                first.push(Reverse(u64::from(rank) << 32 | i as u64));
            }
        }
        let mut heap = BinaryHeap::from(first);
        while let Some(Reverse(entry)) = heap.pop() {
            let (rank, at) = ((entry >> 32) as u32, entry as u32);
            if rank >= limit {
                break;
            }
            let i = at as usize;
            let right = next[i] as usize;
            // Stale if either token has changed since the entry was made.
            if tokens[i] == NONE || right == len || self.rank(tokens[i], tokens[right]) != rank {
                continue;
            }
            tokens[i] = rank;
            tokens[right] = NONE;
            next[i] = next[right];
            let after = next[i] as usize;
            if after < len {
                previous[after] = at;
                let rank = self.rank(tokens[i], tokens[after]);
                if rank != NONE {
                    heap.push(Reverse(u64::from(rank) << 32 | u64::from(at)));
                }
            }
            if i > 0 {
                let before = previous[i];
                let rank = self.rank(tokens[before as usize], tokens[i]);
                if rank != NONE {
                    heap.push(Reverse(u64::from(rank) << 32 | u64::from(before)));
                }
            }
        }
        out.extend(tokens.into_iter().filter(|&t| t != NONE));
    }

    /// Appends the ids of a long part through overlapping windows.
    ///
    /// `encode` appends the ids of one window; it may remember them.
    pub(crate) fn windows(
        &self,
        part: &[u8],
        tokens: &Tokens,
        out: &mut Vec<u32>,
        mut encode: impl FnMut(&[u8], &mut Vec<u32>),
    ) {
        let before = out.len();
        if !self.ordered || !self.try_windows(part, tokens, out, &mut encode) {
            out.truncate(before);
            self.heap(part, out);
        }
    }

    /// False where windows keep disagreeing; what was appended is then wrong.
    fn try_windows(
        &self,
        part: &[u8],
        tokens: &Tokens,
        out: &mut Vec<u32>,
        encode: &mut impl FnMut(&[u8], &mut Vec<u32>),
    ) -> bool {
        let before = out.len();
        let (mut size, mut successes, mut retreats) = (WINDOW, 0, 0);
        // `window` is the encoding of part[start..end]; what is appended to
        // `out` is the one of part[..start], and both may be joined.
        let (mut window, mut next) = (Vec::new(), Vec::new());
        let (mut start, mut end) = (0, size.min(part.len()));
        encode(&part[..end], &mut window);
        while end < part.len() {
            // The tokens of the first half are kept, if the next window, which
            // begins behind them, begins with the same token as this one has.
            let (mut kept, mut cut) = (0, start);
            for &id in &window {
                let after = cut + tokens.get(id).len();
                if after - start > (end - start) / 2 {
                    break;
                }
                (kept, cut) = (kept + 1, after);
            }
            // At least a quarter, so that the work stays within a constant.
            if cut - start >= (end - start) / 4 {
                let stop = part.len().min(cut + size);
                next.clear();
                encode(&part[cut..stop], &mut next);
                if next.first() == window.get(kept) {
                    out.extend_from_slice(&window[..kept]);
                    std::mem::swap(&mut window, &mut next);
                    (start, end) = (cut, stop);
                    successes += 1;
                    if successes == 32 && size > WINDOW {
                        (size, successes) = (size / 2, 0); // the hard stretch may be over
                    }
                    continue;
                }
            }
            (size, successes) = ((end - start) * 2, 0);
            let mut proven = window.first().copied();
            loop {
                end = part.len().min(start + size);
                window.clear();
                encode(&part[start..end], &mut window);
                if out.len() == before || window.first().copied() == proven {
                    break;
                }
                // The border to `out` was proven for another first token.
                let last = out[out.len() - 1];
                if self.are_neighbours(last, window[0], tokens) {
                    break;
                }
                retreats += 1;
                if retreats > 64 {
                    return false;
                }
                out.pop();
                proven = Some(last);
                start -= tokens.get(last).len();
            }
        }
        out.extend_from_slice(&window);
        true
    }

    /// Whether the joined bytes of two tokens encode to these two tokens.
    fn are_neighbours(&self, left: u32, right: u32, tokens: &Tokens) -> bool {
        let bytes = [tokens.get(left), tokens.get(right)].concat();
        let mut ids = Vec::new();
        self.piece(&bytes, &mut ids);
        ids == [left, right]
    }
}

/// Orders by rank, then by place; NONE stays NONE.
#[inline(always)]
fn candidate(rank: u32, place: u32) -> u32 {
    if rank == NONE {
        NONE
    } else {
        rank << PLACE_BITS | place
    }
}

#[inline]
fn byte_pair(a: u8, b: u8) -> usize {
    usize::from(a) << 8 | usize::from(b)
}

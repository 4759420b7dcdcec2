//! Joining the bytes of one piece: the exact rule, and why it is never slow.
//!
//! [`Merges`] holds the pairs that join and what they become. Three ways lead
//! to the same ids:
//!
//! * [`Merges::short`] (in `merge_short`) scans for the lowest rank after every
//!   merge; quick for a few dozen bytes;
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
use crate::merge_short::SHORT;
use crate::pairs::{Pairs, Refused, NONE, NOTHING};

/// Ids below that of no token.
pub(crate) const MAX_TOKENS: usize = NOTHING as usize;
/// The window with which a long piece begins.
const WINDOW: usize = 48;

/// Which pairs join, and into which id. A lower id joins earlier.
pub(crate) struct Merges {
    byte_ids: [u32; 256],
    /// What two single bytes become: most lookups are of such pairs.
    byte_pairs: Vec<u32>,
    pairs: Pairs,
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
        let table = Pairs::new(pairs).map_err(|refused| {
            let message = match refused {
                Refused::Twice(i) => {
                    let (left, right, _) = pairs[i];
                    format!("merge {i} {:?} occurs twice", (left, right))
                }
                Refused::NoHash => "no hash tells the pairs apart".to_owned(),
            };
            Error::new(ErrorKind::InvalidMerges, message)
        })?;
        let mut merges = Merges {
            byte_ids,
            byte_pairs: vec![NONE; 1 << 16],
            pairs: table,
            neighbours: vec![[0; 4]; 256],
            ordered,
        };
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

    /// The id that two single bytes become, or NONE.
    #[inline(always)]
    pub(crate) fn rank_of_bytes(&self, left: u8, right: u8) -> u32 {
        self.byte_pairs[byte_pair(left, right)]
    }

    /// The id that two neighbours become, or NONE.
    #[inline(always)]
    pub(crate) fn rank(&self, left: u32, right: u32) -> u32 {
        self.pairs.get(left, right)
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
            let rank = self.rank_of_bytes(pair[0], pair[1]);
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

#[inline]
fn byte_pair(a: u8, b: u8) -> usize {
    usize::from(a) << 8 | usize::from(b)
}

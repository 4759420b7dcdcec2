//! Encoding and decoding with a list of merges.
//!
//! A piece becomes its bytes, then the pair of lowest rank is joined, leftmost
//! first, until no pair has a rank. Three things make that quick: a piece that
//! is itself a token is looked up whole, a bounded cache keeps the pieces met
//! before, and long pieces use a heap, so that no input is quadratic.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::{Mutex, PoisonError};
use std::thread;

use rustc_hash::FxHashMap;

use crate::error::{Error, ErrorKind};
use crate::split::{split, Pattern};
use crate::train::shares;
use crate::FIRST_MERGE_ID;

/// Pieces up to this many bytes are merged by scanning, longer ones by a heap.
const SHORT_PIECE: usize = 48;
/// Pieces up to this many bytes are worth remembering.
const CACHED_PIECE: usize = 48;
/// A cache that holds this many pieces is emptied before it takes more.
const CACHE_PIECES: usize = 1 << 16;

type Cache = FxHashMap<Box<[u8]>, Box<[u32]>>;

/// A trained byte-level BPE: split pattern and merges.
///
/// All methods take `&self` and may be called from many threads at once.
pub struct Bpe {
    pattern: Pattern,
    merges: Vec<(u32, u32)>,
    ids: FxHashMap<(u32, u32), u32>, // pair -> the id it becomes; lower id = earlier merge
    token_bytes: Vec<u8>,            // all tokens one after the other
    token_ends: Vec<usize>,
    whole: FxHashMap<Box<[u8]>, u32>, // tokens that encode to themselves
    caches: Mutex<Vec<Cache>>,        // borrowed by one call at a time, so never contended
}

impl Bpe {
    /// A BPE from merges in the order in which they were learnt.
    ///
    /// Fails if a merge names an id that does not exist yet or a pair twice.
    pub fn new(merges: Vec<(u32, u32)>, pattern: Pattern) -> Result<Bpe, Error> {
        let mut ids = FxHashMap::default();
        let mut token_bytes: Vec<u8> = (0..=255).collect();
        let mut token_ends: Vec<usize> = (1..=256).collect();
        for (i, &pair) in merges.iter().enumerate() {
            let id = FIRST_MERGE_ID + i as u32;
            if pair.0 >= id || pair.1 >= id {
                let message = format!("merge {i} {pair:?} uses an id above {}", id - 1);
                return Err(Error::new(ErrorKind::InvalidMerges, message));
            }
            if ids.insert(pair, id).is_some() {
                let message = format!("merge {i} {pair:?} occurs twice");
                return Err(Error::new(ErrorKind::InvalidMerges, message));
            }
            for part in [pair.0, pair.1] {
                let range = token_range(&token_ends, part);
                token_bytes.extend_from_within(range);
            }
            token_ends.push(token_bytes.len());
        }
        let caches = Mutex::new(Vec::new());
        let whole = FxHashMap::default();
        let mut bpe = Bpe {
            pattern,
            merges,
            ids,
            token_bytes,
            token_ends,
            whole,
            caches,
        };
        bpe.find_whole_tokens();
        Ok(bpe)
    }

    /// Fills the table of tokens that their own bytes encode to. Training makes
    /// only such tokens; a list of merges from elsewhere may hold others.
    fn find_whole_tokens(&mut self) {
        let mut out = Vec::new();
        for id in 0..self.num_tokens() as u32 {
            let bytes = &self.token_bytes[token_range(&self.token_ends, id)];
            out.clear();
            self.merge_piece(bytes, &mut out);
            if out == [id] {
                self.whole.insert(bytes.into(), id);
            }
        }
    }

    /// The split pattern.
    pub fn pattern(&self) -> Pattern {
        self.pattern
    }

    /// The merges, in the order in which they were learnt.
    pub fn merges(&self) -> &[(u32, u32)] {
        &self.merges
    }

    /// Bytes plus merges.
    pub fn num_tokens(&self) -> usize {
        self.token_ends.len()
    }

    /// The bytes of one token.
    pub fn token(&self, id: u32) -> Result<&[u8], Error> {
        if id as usize >= self.num_tokens() {
            let message = format!("token {id} is not below {}", self.num_tokens());
            return Err(Error::new(ErrorKind::UnknownToken, message));
        }
        Ok(&self.token_bytes[token_range(&self.token_ends, id)])
    }

    /// The ids of `text`.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut cache = self.borrow_cache();
        let mut out = Vec::with_capacity(text.len() / 3);
        self.encode_into(text, &mut cache, &mut out);
        self.return_cache(cache);
        out
    }

    /// The ids of each of `texts`, computed on `threads` threads.
    pub fn encode_batch<S: AsRef<str> + Sync>(&self, texts: &[S], threads: usize) -> Vec<Vec<u32>> {
        let encode_all = |share: &[S]| -> Vec<Vec<u32>> {
            let mut cache = self.borrow_cache();
            let mut results = Vec::with_capacity(share.len());
            for text in share {
                let mut out = Vec::with_capacity(text.as_ref().len() / 3);
                self.encode_into(text.as_ref(), &mut cache, &mut out);
                results.push(out);
            }
            self.return_cache(cache);
            results
        };
        if threads <= 1 || texts.len() < 2 {
            return encode_all(texts);
        }
        thread::scope(|scope| {
            let workers: Vec<_> = shares(texts, threads)
                .into_iter()
                .map(|share| scope.spawn(|| encode_all(share)))
                .collect();
            let join = |w: thread::ScopedJoinHandle<'_, _>| w.join().expect("encoding panicked");
            workers.into_iter().flat_map(join).collect()
        })
    }

    /// The bytes that `ids` stand for; they may end inside a character.
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            bytes.extend_from_slice(self.token(id)?);
        }
        Ok(bytes)
    }

    fn encode_into(&self, text: &str, cache: &mut Cache, out: &mut Vec<u32>) {
        for piece in split(text, self.pattern) {
            let piece = piece.as_bytes();
            if let [byte] = piece {
                out.push((*byte).into());
            } else if let Some(&id) = self.whole.get(piece) {
                out.push(id);
            } else if piece.len() > CACHED_PIECE {
                self.merge_piece(piece, out);
            } else if let Some(ids) = cache.get(piece) {
                out.extend_from_slice(ids);
            } else {
                let start = out.len();
                self.merge_piece(piece, out);
                if cache.len() >= CACHE_PIECES {
                    cache.clear();
                }
                cache.insert(piece.into(), out[start..].into());
            }
        }
    }

    /// Appends the ids of one piece, without any table of whole pieces.
    fn merge_piece(&self, piece: &[u8], out: &mut Vec<u32>) {
        if piece.len() <= SHORT_PIECE {
            self.merge_short(piece, out);
        } else {
            self.merge_long(piece, out);
        }
    }

    fn rank(&self, left: u32, right: u32) -> u32 {
        self.ids.get(&(left, right)).copied().unwrap_or(u32::MAX)
    }

    /// Scans for the lowest rank after every merge: fine for a few dozen bytes.
    fn merge_short(&self, piece: &[u8], out: &mut Vec<u32>) {
        let mut tokens = [0u32; SHORT_PIECE];
        let mut ranks = [u32::MAX; SHORT_PIECE]; // ranks[i] belongs to tokens[i..i + 2]
        let mut len = piece.len();
        for (token, &byte) in tokens.iter_mut().zip(piece) {
            *token = byte.into();
        }
        for i in 1..len {
            ranks[i - 1] = self.rank(tokens[i - 1], tokens[i]);
        }
        while len > 1 {
            let mut best = 0;
            for i in 1..len - 1 {
                if ranks[i] < ranks[best] {
                    best = i;
                }
            }
            if ranks[best] == u32::MAX {
                break;
            }
            tokens[best] = ranks[best]; // the rank is the id
            tokens.copy_within(best + 2..len, best + 1);
            ranks.copy_within(best + 1..len, best);
            len -= 1;
            ranks[len - 1] = u32::MAX;
            if best + 1 < len {
                ranks[best] = self.rank(tokens[best], tokens[best + 1]);
            }
            if best > 0 {
                ranks[best - 1] = self.rank(tokens[best - 1], tokens[best]);
            }
        }
        out.extend_from_slice(&tokens[..len]);
    }

    /// A linked list of tokens and a heap of candidate merges: O(n log n).
    fn merge_long(&self, piece: &[u8], out: &mut Vec<u32>) {
        const GONE: u32 = u32::MAX;
        let len = piece.len();
        assert!(len < GONE as usize, "a piece of 4 GiB");
        let mut tokens: Vec<u32> = piece.iter().map(|&b| b.into()).collect();
        let mut next: Vec<u32> = (1..=len as u32).collect();
        let mut previous: Vec<u32> = (0..len as u32).map(|i| i.wrapping_sub(1)).collect();
        let mut heap = BinaryHeap::with_capacity(len);
        for i in 1..len {
            let rank = self.rank(tokens[i - 1], tokens[i]);
            if rank != u32::MAX {
                heap.push(Reverse((rank, i as u32 - 1)));
            }
        }
        while let Some(Reverse((rank, at))) = heap.pop() {
            let i = at as usize;
            let right = next[i] as usize;
            // Stale if either token has changed since the entry was made.
            if tokens[i] == GONE || right == len || self.rank(tokens[i], tokens[right]) != rank {
                continue;
            }
            tokens[i] = rank;
            tokens[right] = GONE;
            next[i] = next[right];
            let after = next[i] as usize;
            if after < len {
                previous[after] = at;
                let rank = self.rank(tokens[i], tokens[after]);
                if rank != u32::MAX {
                    heap.push(Reverse((rank, at)));
                }
            }
            if i > 0 {
                let before = previous[i];
                let rank = self.rank(tokens[before as usize], tokens[i]);
                if rank != u32::MAX {
                    heap.push(Reverse((rank, before)));
                }
            }
        }
        out.extend(tokens.into_iter().filter(|&t| t != GONE));
    }

    fn borrow_cache(&self) -> Cache {
        self.caches
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop()
            .unwrap_or_default()
    }

    fn return_cache(&self, cache: Cache) {
        self.caches
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(cache);
    }
}

fn token_range(ends: &[usize], id: u32) -> std::ops::Range<usize> {
    let id = id as usize;
    let start = if id == 0 { 0 } else { ends[id - 1] };
    start..ends[id]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_impossible_merges() {
        for merges in [vec![(97, 256)], vec![(97, 98), (97, 98)]] {
            let error = Bpe::new(merges, Pattern::Qwen2).err().expect("refused");
            assert_eq!(error.kind(), ErrorKind::InvalidMerges);
        }
    }

    #[test]
    fn refuses_unknown_ids() {
        let bpe = Bpe::new(vec![(97, 98)], Pattern::Qwen2).unwrap();
        assert_eq!(bpe.decode(&[256]).unwrap(), b"ab");
        assert_eq!(
            bpe.decode(&[257]).unwrap_err().kind(),
            ErrorKind::UnknownToken
        );
    }

    #[test]
    fn long_and_short_pieces_agree() {
        let merges = vec![(97, 97), (256, 256), (257, 97), (98, 97), (256, 98)];
        let bpe = Bpe::new(merges, Pattern::Qwen2).unwrap();
        for text in ["aaaaaaa", "abaabaaab", "bbbb", "aabaa", "ba"] {
            let (mut short, mut long) = (Vec::new(), Vec::new());
            bpe.merge_short(text.as_bytes(), &mut short);
            bpe.merge_long(text.as_bytes(), &mut long);
            assert_eq!(short, long, "{text}");
        }
    }
}

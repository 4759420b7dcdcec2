//! Learning merges: count the pieces, then join the best pair again and again.
//!
//! Two phases. [`Counter`] splits texts on all threads into a table from piece
//! to count: a corpus of any size shrinks to its distinct pieces. [`learn`]
//! then keeps, for every adjacent pair of tokens, its count and the pieces it
//! occurs in, so that one merge touches only those pieces. Counts are u64 and
//! sums do not depend on order, so the result does not depend on the number of
//! threads or the order of the texts.
//!
//! Ties: the highest count wins; among equals the smaller pair of ids
//! `(left, right)`. A pair inside `aaa` counts at each of its places.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::thread;

use rustc_hash::FxHashMap;

use crate::split::{split, Pattern};
use crate::FIRST_MERGE_ID;

type Pair = (u32, u32);

/// Trains merges on `texts` in one call; see [`Counter`] and [`learn`].
pub fn train<'a>(
    texts: impl IntoIterator<Item = &'a str>,
    num_merges: usize,
    pattern: Pattern,
    threads: usize,
) -> Vec<Pair> {
    let mut counter = Counter::new(pattern, threads);
    let texts: Vec<&str> = texts.into_iter().collect();
    counter.add(&texts);
    learn(counter.finish(), num_merges)
}

/// Counts the pieces of texts that arrive in batches.
pub struct Counter {
    pattern: Pattern,
    tables: Vec<FxHashMap<Box<[u8]>, u64>>, // one per thread
}

impl Counter {
    /// An empty counter that works on `threads` threads (at least one).
    pub fn new(pattern: Pattern, threads: usize) -> Counter {
        Counter {
            pattern,
            tables: vec![FxHashMap::default(); threads.max(1)],
        }
    }

    /// Counts the pieces of `texts`; returns when all are counted.
    pub fn add<S: AsRef<str> + Sync>(&mut self, texts: &[S]) {
        let pattern = self.pattern;
        if self.tables.len() == 1 || texts.len() < 2 {
            return count(texts, pattern, &mut self.tables[0]);
        }
        let shares = shares(texts, self.tables.len());
        thread::scope(|scope| {
            for (share, table) in shares.into_iter().zip(&mut self.tables) {
                scope.spawn(move || count(share, pattern, table));
            }
        });
    }

    /// Every distinct piece with its count, in no particular order.
    pub fn finish(self) -> Vec<(Box<[u8]>, u64)> {
        let mut tables = self.tables.into_iter();
        let mut total = tables.next().expect("a counter has at least one table");
        for table in tables {
            for (piece, count) in table {
                *total.entry(piece).or_insert(0) += count;
            }
        }
        total.into_iter().collect()
    }
}

/// `texts` in at most `parts` consecutive slices of about equal bytes.
pub(crate) fn shares<S: AsRef<str>>(texts: &[S], parts: usize) -> Vec<&[S]> {
    let total: usize = texts.iter().map(|t| t.as_ref().len()).sum();
    let mut result = Vec::with_capacity(parts);
    let (mut start, mut bytes) = (0, 0);
    for (i, text) in texts.iter().enumerate() {
        bytes += text.as_ref().len();
        if bytes * parts >= total * (result.len() + 1) && result.len() + 1 < parts {
            result.push(&texts[start..=i]);
            start = i + 1;
        }
    }
    result.push(&texts[start..]);
    result
}

fn count<S: AsRef<str>>(texts: &[S], pattern: Pattern, table: &mut FxHashMap<Box<[u8]>, u64>) {
    for text in texts {
        for piece in split(text.as_ref(), pattern) {
            let piece = piece.as_bytes();
            match table.get_mut(piece) {
                Some(count) => *count += 1,
                None => {
                    table.insert(piece.into(), 1);
                }
            }
        }
    }
}

/// What is known about one adjacent pair of tokens.
#[derive(Default)]
struct PairInfo {
    count: u64,
    words: Vec<u32>, // the words it occurs in, or once did
}

/// A distinct piece as tokens, with its count in the corpus.
struct Word {
    tokens: Vec<u32>,
    count: u64,
}

/// The first `num_merges` merges of the pieces, best first.
///
/// Fewer come back when the pieces hold no further pair.
pub fn learn(pieces: Vec<(Box<[u8]>, u64)>, num_merges: usize) -> Vec<Pair> {
    let mut words: Vec<Word> = pieces
        .into_iter()
        .filter(|(piece, count)| piece.len() > 1 && *count > 0)
        .map(|(piece, count)| Word {
            tokens: piece.iter().map(|&b| b.into()).collect(),
            count,
        })
        .collect();
    let mut pairs: FxHashMap<Pair, PairInfo> = FxHashMap::default();
    for (i, word) in words.iter().enumerate() {
        for pair in word.tokens.windows(2) {
            add_pair(&mut pairs, (pair[0], pair[1]), word.count, i as u32);
        }
    }
    // Entries may be stale: an old pair's count only ever falls, so an entry
    // that is too high is put back with its true count when it comes up.
    let mut heap: BinaryHeap<(u64, Reverse<Pair>)> = pairs
        .iter()
        .map(|(&pair, info)| (info.count, Reverse(pair)))
        .collect();
    let mut merges = Vec::with_capacity(num_merges);
    let mut fresh: FxHashMap<Pair, PairInfo> = FxHashMap::default();
    while merges.len() < num_merges {
        let Some((count, Reverse(pair))) = heap.pop() else {
            break;
        };
        let now = pairs.get(&pair).map_or(0, |info| info.count);
        if now != count {
            if now > 0 {
                heap.push((now, Reverse(pair)));
            }
            continue;
        }
        let id = FIRST_MERGE_ID + merges.len() as u32;
        let info = pairs.remove(&pair).expect("its count was just read");
        for w in info.words {
            merge_word(&mut words[w as usize], w, pair, id, &mut pairs, &mut fresh);
        }
        for (pair, info) in fresh.drain() {
            if info.count > 0 {
                heap.push((info.count, Reverse(pair)));
                pairs.insert(pair, info);
            }
        }
        merges.push(pair);
    }
    merges
}

fn add_pair(pairs: &mut FxHashMap<Pair, PairInfo>, pair: Pair, count: u64, word: u32) {
    let info = pairs.entry(pair).or_default();
    info.count += count;
    if info.words.last() != Some(&word) {
        info.words.push(word);
    }
}

/// Replaces `pair` by `id` in one word and keeps the counts of its neighbours.
///
/// Pairs that hold `id` are new with this merge and go to `fresh`.
fn merge_word(
    word: &mut Word,
    index: u32,
    pair: Pair,
    id: u32,
    pairs: &mut FxHashMap<Pair, PairInfo>,
    fresh: &mut FxHashMap<Pair, PairInfo>,
) {
    let count = word.count;
    let tokens = &mut word.tokens;
    let (mut read, mut write) = (0, 0);
    while read < tokens.len() {
        if read + 1 == tokens.len() || (tokens[read], tokens[read + 1]) != pair {
            tokens[write] = tokens[read];
            read += 1;
            write += 1;
            continue;
        }
        if write > 0 {
            let left = tokens[write - 1];
            remove_pair((left, pair.0), count, id, pairs, fresh);
            add_pair(fresh, (left, id), count, index);
        }
        if let Some(&right) = tokens.get(read + 2) {
            remove_pair((pair.1, right), count, id, pairs, fresh);
            add_pair(fresh, (id, right), count, index);
        }
        tokens[write] = id;
        read += 2;
        write += 1;
    }
    tokens.truncate(write);
}

/// One place less for an existing pair; the pair being merged is gone already.
fn remove_pair(
    pair: Pair,
    count: u64,
    id: u32,
    pairs: &mut FxHashMap<Pair, PairInfo>,
    fresh: &mut FxHashMap<Pair, PairInfo>,
) {
    let table = if pair.0 == id || pair.1 == id {
        fresh
    } else {
        pairs
    };
    if let Some(info) = table.get_mut(&pair) {
        info.count -= count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_the_smaller_pair() {
        let merges = train(["ab", "cd"], 2, Pattern::Qwen2, 1);
        assert_eq!(merges, [(97, 98), (99, 100)]);
    }

    #[test]
    fn stops_when_nothing_is_left() {
        assert_eq!(train(["abc"], 10, Pattern::Qwen2, 1).len(), 2);
        assert!(train([""; 0], 10, Pattern::Qwen2, 1).is_empty());
    }

    #[test]
    fn repeated_letters() {
        assert_eq!(
            train(["aaaaaaaaa"], 3, Pattern::Qwen2, 1),
            [(97, 97), (256, 256), (257, 97)]
        );
    }

    #[test]
    fn shares_cover_everything_in_order() {
        let texts = ["a", "bbbb", "", "cc", "d"];
        for parts in 1..8 {
            let joined: Vec<&str> = shares(&texts, parts).concat();
            assert_eq!(joined, texts);
            assert!(shares(&texts, parts).len() <= parts);
        }
    }
}

//! The naive twin: the same functions, written to be read.
//!
//! Splitting runs the published regex, every merge recounts every pair of the
//! whole corpus, and every encoding replays every merge. Tests, benches and
//! fuzz targets hold the fast code equal to it; nothing else calls it.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};

use crate::scan::Scanner;
use crate::split::Pattern;
use crate::FIRST_MERGE_ID;

/// What [`crate::split`] must return: the pieces by the published regex.
pub fn split(text: &str, pattern: Pattern) -> Vec<&str> {
    let regex = Pattern::custom(pattern.regex()).expect("published regexes compile");
    crate::split(text, regex).collect()
}

/// Where the pieces end, by the scanner that finds one at a time.
///
/// For benches and tests of the block scanner; a custom pattern has no scanner and gives nothing.
pub fn scan(text: &str, pattern: Pattern) -> Vec<usize> {
    let Some(rule) = pattern.rule() else {
        return Vec::new();
    };
    let scanner = Scanner::new(text, rule);
    let next = |&at: &usize| (at < text.len()).then(|| scanner.piece_end(at));
    std::iter::successors(next(&0), next).collect()
}

/// What [`crate::train`] must return.
pub fn train(texts: &[&str], num_merges: usize, pattern: Pattern) -> Vec<(u32, u32)> {
    let mut words: Vec<Vec<u32>> = texts
        .iter()
        .flat_map(|text| split(text, pattern))
        .map(|piece| piece.bytes().map(u32::from).collect())
        .collect();
    let mut merges = Vec::new();
    while merges.len() < num_merges {
        let mut counts: BTreeMap<(u32, u32), u64> = BTreeMap::new();
        for word in &words {
            for pair in word.windows(2) {
                *counts.entry((pair[0], pair[1])).or_default() += 1;
            }
        }
        let best = counts
            .iter()
            .max_by_key(|(&pair, &count)| (count, Reverse(pair)));
        let Some((&pair, _)) = best else { break };
        let id = FIRST_MERGE_ID + merges.len() as u32;
        for word in &mut words {
            *word = join(word, pair, id);
        }
        merges.push(pair);
    }
    merges
}

/// What [`crate::Bpe::encode`] must return.
pub fn encode(text: &str, merges: &[(u32, u32)], pattern: Pattern) -> Vec<u32> {
    let mut ids = Vec::new();
    for piece in split(text, pattern) {
        let mut tokens: Vec<u32> = piece.bytes().map(u32::from).collect();
        for (i, &pair) in merges.iter().enumerate() {
            tokens = join(&tokens, pair, FIRST_MERGE_ID + i as u32);
        }
        ids.extend(tokens);
    }
    ids
}

/// What [`crate::Bpe::encode`] must return after [`crate::Bpe::from_ranks`]; a token's rank is its
/// place in `tokens`.
pub fn encode_by_ranks(text: &str, tokens: &[Vec<u8>], pattern: Pattern) -> Vec<u32> {
    let ranks: HashMap<&[u8], u32> = tokens.iter().map(Vec::as_slice).zip(0..).collect();
    let mut ids = Vec::new();
    for piece in split(text, pattern) {
        if let Some(&id) = ranks.get(piece.as_bytes()) {
            ids.push(id);
            continue;
        }
        let mut parts: Vec<Vec<u8>> = piece.bytes().map(|b| vec![b]).collect();
        loop {
            let joined = parts.windows(2).map(|two| ranks.get(&two.concat()[..]));
            let known = joined.enumerate().filter_map(|(i, rank)| Some((*rank?, i)));
            let Some((_, i)) = known.min() else { break };
            let right = parts.remove(i + 1);
            parts[i].extend(right);
        }
        ids.extend(parts.iter().map(|part| ranks[&part[..]]));
    }
    ids
}

/// `tokens` with every `pair` replaced by `id`, from the left.
///
/// `[1, 2, 3, 1, 2]` with `(1, 2) -> 4` becomes `[4, 3, 4]`.
fn join(tokens: &[u32], pair: (u32, u32), id: u32) -> Vec<u32> {
    let mut out = Vec::with_capacity(tokens.len());
    let mut i = 0;
    while i < tokens.len() {
        if i + 1 < tokens.len() && (tokens[i], tokens[i + 1]) == pair {
            out.push(id);
            i += 2;
        } else {
            out.push(tokens[i]);
            i += 1;
        }
    }
    out
}

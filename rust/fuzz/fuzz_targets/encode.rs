//! Encoding equals the naive twins, by merges and by ranks, from a full cache too, and decodes back.
//!
//! The first bytes of an input choose the pattern, the merges (any two tokens may join, as nobody
//! would learn them, or what training learns from the text), the rest is the text.
//!
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run encode -- -max_total_time=300`

#![no_main]

use fledge_bpe::{reference, train, Bpe, Pattern};
use libfuzzer_sys::fuzz_target;

/// Few letters, so that merges abound; a byte of the input picks one.
const ALPHABET: [char; 16] = [
    'a', 'b', 'c', 'd', 'a', 'b', 'a', ' ', 'e', '\'', '\n', '7', '.', '\u{e9}', '\u{4e2d}',
    '\u{301}',
];
/// The naive twins are quadratic.
const MAX_CHARS: usize = 600;
const MAX_MERGES: usize = 24;

fn text_of(data: &[u8]) -> String {
    // The high bits of a byte repeat its character, so that pieces get longer than every limit.
    let run = |&b: &u8| {
        let times = [1, 1, 2, 40][b as usize >> 6];
        std::iter::repeat_n(ALPHABET[b as usize & 15], times)
    };
    data.iter().flat_map(run).take(MAX_CHARS).collect()
}

/// Merges of any two tokens, mostly of letters and of the newest.
fn wild_merges(data: &[u8]) -> Vec<(u32, u32)> {
    let mut merges: Vec<(u32, u32)> = Vec::new();
    for two in data.chunks_exact(2).take(MAX_MERGES) {
        let pick = |b: u8| match b as usize % (4 + merges.len()) {
            letter @ 0..4 => u32::from(b'a') + letter as u32,
            merge => 256 + merge as u32 - 4,
        };
        let pair = (pick(two[0]), pick(two[1]));
        if !merges.contains(&pair) {
            merges.push(pair);
        }
    }
    merges
}

fuzz_target!(|data: &[u8]| {
    let [mode, length, data @ ..] = data else {
        return;
    };
    let pattern = Pattern::ALL[*mode as usize % Pattern::ALL.len()];
    let (choice, data) = data.split_at(data.len().min(*length as usize % 49));
    let text = if mode & 8 == 0 {
        text_of(data)
    } else {
        String::from_utf8_lossy(data).chars().take(MAX_CHARS).collect()
    };
    let merges = if mode & 16 == 0 {
        wild_merges(choice)
    } else {
        train([&text[..]], MAX_MERGES, pattern, 1).expect("texts can be counted")
    };
    let bpe = Bpe::new(merges.clone(), pattern).expect("each pair once, of tokens that exist");
    let expected = reference::encode(&text, &merges, pattern);
    assert_eq!(bpe.encode(&text), expected);
    assert_eq!(bpe.encode(&text), expected, "from the cache");
    assert_eq!(bpe.count(&text), expected.len());
    let narrow = bpe.encode_u16(&text).into_iter().map(u32::from);
    assert!(narrow.eq(expected.iter().copied()));
    assert_eq!(bpe.decode(&expected).expect("known ids"), text.as_bytes());

    // The same tokens by their ranks, those with the same bytes once.
    let mut tokens: Vec<Vec<u8>> = Vec::new();
    for id in 0..bpe.num_tokens() as u32 {
        let token = bpe.token(id).expect("below num_tokens").to_vec();
        if !tokens.contains(&token) {
            tokens.push(token);
        }
    }
    tokens.rotate_right(usize::from(length / 49)); // the bytes need not come first
    let ranks = tokens.iter().cloned().zip(0..).collect();
    let by_ranks = Bpe::from_ranks(ranks, pattern).expect("every byte, each token once");
    let expected = reference::encode_by_ranks(&text, &tokens, pattern);
    assert_eq!(by_ranks.encode(&text), expected);
    assert_eq!(by_ranks.encode(&text), expected, "from the cache");
});

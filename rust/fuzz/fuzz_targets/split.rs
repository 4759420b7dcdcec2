//! Every pattern cuts every text as its published regex does, and a safe cut changes nothing.
//!
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run split -- -max_total_time=300`

#![no_main]

use fledge_bpe::{reference, split, Counter, Pattern};
use libfuzzer_sys::fuzz_target;

/// Characters that some rule treats in a way of its own; a byte of the input picks one.
const ALPHABET: [char; 64] = [
    '\'',
    ' ',
    '\n',
    '\r',
    '\t',
    '\u{b}',
    '\u{85}',
    '\u{a0}',
    '\u{2028}',
    '\u{3000}',
    '\u{200b}',
    '\u{1c}',
    's',
    'S',
    't',
    'd',
    'm',
    'r',
    'R',
    'e',
    'E',
    'v',
    'l',
    'L',
    'a',
    'B',
    '0',
    '1',
    '9',
    '\u{b2}',
    '\u{663}',
    '\u{2164}',
    '\u{1d7ce}',
    '\u{301}',
    '\u{20dd}',
    '\u{939}',
    '\u{93f}',
    '\u{e31}',
    '\u{1c5}',
    '\u{2b0}',
    '\u{aa}',
    '\u{17f}',
    '\u{212a}',
    '\u{df}',
    '\u{c9}',
    '\u{436}',
    '\u{416}',
    '\u{4e2d}',
    '\u{ac00}',
    '\u{10400}',
    '\u{10428}',
    '/',
    '!',
    '.',
    '-',
    '_',
    '\0',
    '\u{2019}',
    '\u{ff0c}',
    '\u{1f600}',
    '\u{200d}',
    '\u{fe0f}',
    '\u{10ffff}',
    '\u{e000}',
];

fuzz_target!(|data: &[u8]| {
    let Some((&mode, data)) = data.split_first() else {
        return;
    };
    let text: String = if mode & 1 == 0 {
        String::from_utf8_lossy(data).into_owned()
    } else {
        // The two high bits of a byte repeat its character, to get across blocks.
        let run = |&b: &u8| {
            std::iter::repeat_n(ALPHABET[b as usize & 63], [1, 1, 5, 33][b as usize >> 6])
        };
        data.iter().flat_map(run).collect()
    };
    let pattern = Pattern::ALL[mode as usize / 2 % Pattern::ALL.len()];
    let pieces: Vec<&str> = split(&text, pattern).collect();
    assert_eq!(
        pieces,
        reference::split(&text, pattern),
        "{}",
        pattern.name()
    );
    let mut start = 0;
    let ends = pieces.iter().map(|piece| {
        start += piece.len();
        start
    });
    assert!(ends.eq(reference::scan(&text, pattern)));
    let mut counter = Counter::new(pattern, 1);
    counter.add(&[&text]).expect("nothing is spilled");
    let total: u64 = counter
        .finish()
        .expect("complete")
        .iter()
        .map(|(_, count)| count)
        .sum();
    assert_eq!(total, pieces.len() as u64);
});

//! What comes from files: merges, ranks, patterns, saved counts. Anything is refused with an error
//! or works; nothing panics, hangs or takes memory beyond its limits.
//!
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run load -- -max_total_time=300`

#![no_main]

use fledge_bpe::{Bpe, Counter, Decoder, ErrorKind, Pattern};
use libfuzzer_sys::fuzz_target;

const TEXT: &str = "The cat, 17 \u{4e2d}\u{6587}  \n aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab!";

/// Whatever was accepted gives back what was put in.
fn check(bpe: &Bpe) {
    let ids = bpe.encode(TEXT);
    assert_eq!(bpe.decode(&ids).expect("known ids"), TEXT.as_bytes());
    assert_eq!(bpe.count(TEXT), ids.len());
    let unknown = bpe.decode(&[bpe.num_tokens() as u32]);
    assert_eq!(unknown.unwrap_err().kind(), ErrorKind::UnknownToken);
}

fn merges(data: &[u8]) {
    // Ids from 0 to 511 and a few that are far too high.
    let id = |two: &[u8]| match u32::from(two[0]) << 8 | u32::from(two[1]) {
        low @ 0..0xFF00 => low % 512,
        high => high << 16,
    };
    let pairs = data.chunks_exact(4).map(|four| (id(&four[..2]), id(&four[2..])));
    match Bpe::new(pairs.collect(), Pattern::Qwen2) {
        Ok(bpe) => check(&bpe),
        Err(error) => assert!(matches!(
            error.kind(),
            ErrorKind::InvalidMerges | ErrorKind::TooLarge
        )),
    }
}

fn ranks(mode: u8, data: &[u8]) {
    // Tokens between zero bytes; mostly behind the 256 single bytes, now and then instead of them.
    let mut ranks: Vec<(Vec<u8>, u32)> = Vec::new();
    if mode & 1 == 0 {
        ranks.extend((0..=255u8).map(|b| (vec![b], u32::from(b))));
    }
    for token in data.split(|&b| b == 0) {
        ranks.push((token.to_vec(), ranks.len() as u32));
    }
    if let (2.., Some(entry)) = (mode & 7, ranks.get_mut(usize::from(mode))) {
        entry.1 = entry.1.wrapping_add(u32::from(mode) << 3); // a gap, or a rank twice
    }
    match Bpe::from_ranks(ranks, Pattern::O200k) {
        Ok(bpe) => check(&bpe),
        Err(error) => assert!(matches!(
            error.kind(),
            ErrorKind::InvalidRanks | ErrorKind::TooLarge
        )),
    }
}

/// A file of counts as it was saved, with some bytes changed, or anything at all.
fn counts(mode: u8, data: &[u8]) {
    let path = std::env::temp_dir().join(format!("fledge-fuzz-{}", std::process::id()));
    if mode & 1 == 0 {
        std::fs::write(&path, data).expect("a temporary file");
    } else {
        let mut counter = Counter::new(Pattern::Qwen2, 1);
        counter.add(&[TEXT]).expect("nothing is spilled");
        counter.save(&path).expect("a temporary file");
        let mut bytes = std::fs::read(&path).expect("just written");
        for three in data.chunks_exact(3) {
            let at = (usize::from(three[0]) << 8 | usize::from(three[1])) % bytes.len();
            bytes[at] ^= three[2];
        }
        if mode & 2 != 0 {
            bytes.truncate(bytes.len() - data.len() % bytes.len());
        }
        std::fs::write(&path, bytes).expect("a temporary file");
    }
    let mut counter = Counter::new(Pattern::Qwen2, 1);
    let added = counter.add_saved(&path);
    std::fs::remove_file(&path).expect("a temporary file");
    if added.is_err() {
        // Nothing of it was added.
        assert!(counter.finish().expect("complete").is_empty());
        assert_eq!((counter.num_texts(), counter.num_bytes()), (0, 0));
    }
}

fn bytes_in_any_parts(data: &[u8]) {
    let mut decoder = Decoder::new();
    let mut text = String::new();
    for part in data.chunks(3) {
        text += &decoder.push(part);
    }
    text += &decoder.finish();
    assert_eq!(text, String::from_utf8_lossy(data));
}

fuzz_target!(|data: &[u8]| {
    let [kind, mode, data @ ..] = data else {
        return;
    };
    match kind % 5 {
        0 => merges(data),
        1 => ranks(*mode, data),
        2 => counts(*mode, data),
        3 => bytes_in_any_parts(data),
        _ => {
            // Few: a regex that compiles is kept for the life of the process.
            let name = String::from_utf8_lossy(&data[..data.len().min(12)]).into_owned();
            if let Ok(pattern) = name.parse::<Pattern>() {
                check(&Bpe::new(vec![(97, 97)], pattern).expect("one merge"));
            }
        }
    }
});

//! The trainer gives what the naive one gives, whatever the threads, the order and the memory.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use fledge_bpe::{learn, reference, split, train, Counter, ErrorKind, Pattern, PieceCounts};
use proptest::prelude::*;

/// A folder of this test alone, gone with it.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("fledge-test-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn num_files(&self) -> usize {
        fs::read_dir(&self.0).unwrap().count()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn sorted(pieces: &PieceCounts) -> BTreeMap<Vec<u8>, u64> {
    pieces
        .iter()
        .map(|(piece, n)| (piece.to_vec(), n))
        .collect()
}

fn naive_counts(texts: &[&str], pattern: Pattern) -> BTreeMap<Vec<u8>, u64> {
    let mut counts = BTreeMap::new();
    for piece in texts.iter().flat_map(|text| split(text, pattern)) {
        *counts.entry(piece.as_bytes().to_vec()).or_default() += 1;
    }
    counts
}

/// About `len` bytes of words, numbers and punctuation that hardly repeat.
fn noise(len: usize, seed: u32) -> String {
    let mut text = String::new();
    let mut state = seed;
    while text.len() < len {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let word = state >> 8;
        match word % 11 {
            0 => text.push_str("\n\n"),
            1 => text.push_str(" it's "),
            2 => text.push_str("\u{4e2d}\u{6587}\u{ff0c}"),
            3 => text.push_str(&format!(" {}", word % 5000)),
            _ => text.push_str(&format!(
                " {:x}{}",
                word % 90_000,
                "long".repeat(word as usize % 7)
            )),
        }
    }
    text
}

/// Few letters, so that merges, overlaps and ties abound.
fn texts() -> impl Strategy<Value = Vec<String>> {
    let text = prop_oneof![
        "[ab ]{0,40}",
        "[a-e' 0-9\n!]{0,60}",
        "\\PC{0,30}",
        "a{0,200}",
        "(ab){0,60}",
        "[ab]{100,300}",
    ];
    prop::collection::vec(text, 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    #[test]
    fn merges_equal_the_reference(texts in texts(), threads in 1usize..4, n in 0usize..80) {
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        for pattern in [Pattern::Qwen2, Pattern::O200k, Pattern::Llama3Marks] {
            let fast = train(texts.iter().copied(), n, pattern, threads).unwrap();
            prop_assert_eq!(fast, reference::train(&texts, n, pattern));
        }
    }

    #[test]
    fn skewed_counts_equal_the_reference(words in prop::collection::vec(("[abc]{1,9}", 1usize..300), 1..8)) {
        // High counts beside low ones: the floor of the trainer has to come down.
        let text: String = words.iter().map(|(word, n)| format!(" {word}").repeat(*n)).collect();
        let fast = train([text.as_str()], 30, Pattern::Qwen2, 1).unwrap();
        prop_assert_eq!(fast, reference::train(&[&text], 30, Pattern::Qwen2));
    }
}

#[test]
fn counting_in_parts_is_counting_whole() {
    // Long texts are cut for the threads.
    let texts = [
        noise(3 << 20, 1),
        noise(100, 2),
        "x".repeat(2 << 20),
        noise(1 << 20, 3),
    ];
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    for pattern in Pattern::ALL {
        let expected = naive_counts(&texts, pattern);
        for threads in 1..4 {
            let mut counter = Counter::new(pattern, threads);
            counter.add(&texts).unwrap();
            assert!(
                sorted(&counter.finish().unwrap()) == expected,
                "{}",
                pattern.name()
            );
        }
    }
}

#[test]
fn a_reader_counts_as_one_text() {
    let text = noise(40 << 20, 7);
    let mut counter = Counter::new(Pattern::Qwen2, 2);
    counter.add_reader(text.as_bytes(), &mut |_| false).unwrap();
    assert_eq!(counter.num_texts(), 1);
    assert_eq!(counter.num_bytes(), text.len() as u64);
    assert!(sorted(&counter.finish().unwrap()) == naive_counts(&[&text], Pattern::Qwen2));
    let mut counter = Counter::new(Pattern::Qwen2, 2);
    let error = counter
        .add_reader(&b"ab\xff"[..], &mut |_| false)
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(counter.is_incomplete());
}

#[test]
fn spilling_changes_nothing() {
    let folder = Folder::new("spill");
    let texts: Vec<String> = (0..40).map(|i| noise(1 << 16, i % 30)).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let expected = naive_counts(&texts, Pattern::Qwen2);
    // Room for all distinct pieces when learning, but not for the tables when counting.
    let limit: usize = 32 * expected.keys().map(Vec::len).sum::<usize>();
    for threads in [1, 3] {
        let mut counter = Counter::new(Pattern::Qwen2, threads)
            .max_memory(limit / 8)
            .spill_folder(&folder.0);
        counter.add(&texts).unwrap();
        assert!(folder.num_files() > 0, "nothing was spilled");
        let saved = folder.0.join("saved");
        counter.save(&saved).unwrap();
        let mut roomy = Counter::new(Pattern::Qwen2, 2);
        roomy.add_saved(&saved).unwrap();
        assert!(sorted(&roomy.finish().unwrap()) == expected);
        fs::remove_file(saved).unwrap();
        drop(counter);
        assert_eq!(folder.num_files(), 0);
    }
}

#[test]
fn too_many_pieces_leave_out_the_rarest() {
    let folder = Folder::new("rare");
    let texts: Vec<String> = (0..20).map(|i| noise(1 << 16, i % 13)).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let all = naive_counts(&texts, Pattern::Qwen2);
    let bytes: usize = all.keys().map(Vec::len).sum();
    let mut results = Vec::new();
    for threads in [1, 2] {
        let mut counter = Counter::new(Pattern::Qwen2, threads)
            .max_memory(32 * bytes / 2)
            .spill_folder(&folder.0);
        let half = texts.len() / threads;
        counter.add(&texts[half..]).unwrap();
        counter.add(&texts[..half]).unwrap();
        results.push(sorted(&counter.finish().unwrap()));
    }
    assert!(results[0] == results[1]);
    let kept = &results[0];
    let least = *kept.values().min().unwrap();
    assert!(least > 1 && kept.len() < all.len());
    assert!(all
        .iter()
        .all(|(piece, &n)| (n >= least) == kept.contains_key(piece)));
}

#[test]
fn a_saved_state_goes_on() {
    let folder = Folder::new("save");
    let (first, second) = (noise(1 << 16, 1), noise(1 << 16, 2));
    let (one, two) = (folder.0.join("one"), folder.0.join("two"));
    let mut whole = Counter::new(Pattern::Qwen2, 1);
    whole.add(&[&second, &first]).unwrap();
    let mut counter = Counter::new(Pattern::Qwen2, 2);
    counter.add(&[&first]).unwrap();
    counter.save(&one).unwrap();
    let mut resumed = Counter::new(Pattern::Qwen2, 2);
    resumed.add_saved(&one).unwrap();
    resumed.add(&[&second]).unwrap();
    assert_eq!(resumed.num_texts(), 2);
    assert_eq!(
        learn(&resumed.finish().unwrap(), 200).unwrap(),
        learn(&whole.finish().unwrap(), 200).unwrap()
    );
    resumed.save(&one).unwrap();
    whole.save(&two).unwrap();
    assert!(fs::read(&one).unwrap() == fs::read(&two).unwrap());
    assert_eq!(Counter::saved_pattern(&one).unwrap(), Pattern::Qwen2);
    let error = Counter::new(Pattern::O200k, 1).add_saved(&one).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::CorruptCounts);
}

#[test]
fn a_damaged_file_is_refused_and_nothing_of_it_counted() {
    let folder = Folder::new("damage");
    let path = folder.0.join("counts");
    let mut counter = Counter::new(Pattern::Qwen2, 1);
    counter
        .add(&["some words, some of them twice: words"])
        .unwrap();
    counter.save(&path).unwrap();
    let good = fs::read(&path).unwrap();
    let mut fresh = Counter::new(Pattern::Qwen2, 1);
    let mut refuse = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let error = fresh.add_saved(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::CorruptCounts, "{error}");
        assert!(!fresh.is_incomplete() && fresh.finish().unwrap().is_empty());
    };
    for len in 0..good.len() {
        refuse(&good[..len]);
    }
    for i in 0..good.len() {
        for flip in [1, 0x40, 0xFF] {
            let mut bad = good.clone();
            bad[i] ^= flip;
            refuse(&bad);
        }
    }
    refuse(&[&good[..], b"x"].concat());
    let error = Counter::new(Pattern::Qwen2, 1)
        .add_saved(folder.0.join("none"))
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
}

//! The fast code against its naive twin, on texts made to be awkward.

use fledge_bpe::{reference, split, train, Bpe, Pattern};
use proptest::prelude::*;

/// Few letters, so that merges, overlaps and ties abound.
fn texts() -> impl Strategy<Value = Vec<String>> {
    let text = prop_oneof![
        "[ab ]{0,40}",
        "[a-e' 0-9\n!]{0,60}",
        "\\PC{0,30}",
        "a{0,200}"
    ];
    prop::collection::vec(text, 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    #[test]
    fn pieces_join_to_the_text(text in any::<String>()) {
        for pattern in Pattern::ALL {
            prop_assert_eq!(split(&text, pattern).collect::<String>(), text.clone());
            prop_assert!(split(&text, pattern).all(|piece| !piece.is_empty()));
        }
    }

    #[test]
    fn merges_equal_the_reference(texts in texts(), threads in 1usize..4) {
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let fast = train(texts.iter().copied(), 60, Pattern::Qwen2, threads).unwrap();
        prop_assert_eq!(fast, reference::train(&texts, 60, Pattern::Qwen2));
    }

    #[test]
    fn ids_equal_the_reference_and_decode_back(texts in texts(), other in any::<String>()) {
        let merges = train(texts.iter().map(String::as_str), 100, Pattern::Gpt4Two, 1).unwrap();
        let bpe = Bpe::new(merges.clone(), Pattern::Gpt4Two).unwrap();
        for text in texts.iter().chain([&other]) {
            let ids = bpe.encode(text);
            prop_assert_eq!(&ids, &reference::encode(text, &merges, Pattern::Gpt4Two));
            prop_assert_eq!(&ids, &bpe.encode(text)); // now from the cache
            prop_assert_eq!(bpe.decode(&ids).unwrap(), text.as_bytes());
        }
        for threads in 1..4 {
            let batch = bpe.encode_batch(&texts, threads);
            let single: Vec<Vec<u32>> = texts.iter().map(|t| bpe.encode(t)).collect();
            prop_assert_eq!(batch, single);
        }
    }
}

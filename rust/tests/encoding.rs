//! Encoding against naive twins where it could go wrong: long pieces and their
//! windows, pieces from the cache, ranks in tiktoken's sense, threads.

use fledge_bpe::{reference, train, Bpe, Pattern};
use proptest::prelude::*;

fn config() -> ProptestConfig {
    ProptestConfig {
        failure_persistence: None,
        ..Default::default()
    }
}

/// Long pieces of few letters, many of them periodic.
fn long_text() -> impl Strategy<Value = String> {
    let period = prop_oneof![
        "[ab]{1,6}",
        "[a-d]{1,20}",
        " {1,3}",
        "\u{301}|\u{1f600}|\u{4e2d}"
    ];
    let run = (period, 1usize..200).prop_map(|(part, times)| part.repeat(times));
    let mess = "[ab]{0,400}|[a-c]{0,300}|[a-zA-Z]{0,200}|\\PC{0,40}";
    prop::collection::vec(prop_oneof![run, mess], 1..5).prop_map(|parts| parts.concat())
}

/// Merges as nobody would learn them: any two tokens may join.
fn wild_merges() -> impl Strategy<Value = Vec<(u32, u32)>> {
    let pair = (any::<prop::sample::Index>(), any::<prop::sample::Index>());
    prop::collection::vec(pair, 0..60).prop_map(|picks| {
        let mut merges = Vec::new();
        for (i, (left, right)) in picks.iter().enumerate() {
            // Mostly a, b, c and the newest tokens.
            let pick = |index: &prop::sample::Index| match index.index(3 + merges.len()) as u32 {
                letter @ 0..3 => u32::from(b'a') + letter,
                merge => 256 + merge - 3,
            };
            let pair = (pick(left), pick(right));
            if !merges.contains(&pair) && i < 60 {
                merges.push(pair);
            }
        }
        merges
    })
}

fn ranks_of(bpe: &Bpe) -> Vec<(Vec<u8>, u32)> {
    let token = |id| (bpe.token(id).unwrap().to_vec(), id);
    (0..bpe.num_tokens() as u32).map(token).collect()
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn long_pieces_equal_the_reference(texts in prop::collection::vec(long_text(), 1..4)) {
        let merges = train(texts.iter().map(String::as_str), 80, Pattern::Qwen2, 1).unwrap();
        let bpe = Bpe::new(merges.clone(), Pattern::Qwen2).unwrap();
        for text in &texts {
            let expected = reference::encode(text, &merges, Pattern::Qwen2);
            prop_assert_eq!(&bpe.encode(text), &expected);
            prop_assert_eq!(&bpe.encode(text), &expected); // now from the cache
            prop_assert_eq!(bpe.count(text), expected.len());
        }
    }

    #[test]
    fn any_merges_equal_the_reference(merges in wild_merges(), text in "[abc]{0,400}") {
        let bpe = Bpe::new(merges.clone(), Pattern::Qwen2).unwrap();
        prop_assert_eq!(bpe.encode(&text), reference::encode(&text, &merges, Pattern::Qwen2));
    }

    #[test]
    fn ranks_of_merges_give_the_same_ids(texts in prop::collection::vec(long_text(), 1..3)) {
        let merges = train(texts.iter().map(String::as_str), 60, Pattern::Llama3, 1).unwrap();
        let bpe = Bpe::new(merges, Pattern::Llama3).unwrap();
        let other = Bpe::from_ranks(ranks_of(&bpe), Pattern::Llama3).unwrap();
        for text in &texts {
            let ids = other.encode(text);
            prop_assert_eq!(&ids, &bpe.encode(text));
            prop_assert_eq!(other.decode(&ids).unwrap(), text.as_bytes());
        }
    }

    /// Tokens that no merges make, ranks in no order, bytes anywhere.
    #[test]
    fn any_ranks_equal_the_naive_rule(
        tokens in prop::collection::hash_set("[abc]{2,7}", 0..40),
        seed in any::<prop::sample::Index>(),
        text in "[abc ]{0,200}",
    ) {
        let bytes = (0..=255u8).map(|b| vec![b]);
        let mut list: Vec<Vec<u8>> = bytes.chain(tokens.into_iter().map(String::into_bytes)).collect();
        let len = list.len();
        list.rotate_left(seed.index(len));
        let step = 1 + seed.index(97); // interleaves bytes and tokens
        let mut order: Vec<usize> = (0..len).collect();
        order.sort_by_key(|i| i * step % len);
        let ranks: Vec<(Vec<u8>, u32)> =
            order.iter().enumerate().map(|(rank, &i)| (list[i].clone(), rank as u32)).collect();
        let bpe = Bpe::from_ranks(ranks.clone(), Pattern::Qwen2).unwrap();
        let tokens: Vec<Vec<u8>> = ranks.into_iter().map(|(token, _)| token).collect();
        let expected = reference::encode_by_ranks(&text, &tokens, Pattern::Qwen2);
        prop_assert_eq!(bpe.encode(&text), expected.clone());
        prop_assert_eq!(bpe.encode(&text), expected);
    }

    #[test]
    fn all_forms_give_the_same_ids(
        texts in prop::collection::vec(prop_oneof![long_text(), any::<String>()], 0..8),
        threads in 1usize..4,
    ) {
        let merges = train(texts.iter().map(String::as_str), 50, Pattern::Gpt4Two, 1).unwrap();
        let bpe = Bpe::new(merges, Pattern::Gpt4Two).unwrap();
        let single: Vec<Vec<u32>> = texts.iter().map(|text| bpe.encode(text)).collect();
        prop_assert_eq!(&bpe.encode_batch(&texts, threads), &single);
        let (flat, offsets) = bpe.encode_flat(&texts, threads);
        prop_assert_eq!(offsets.len(), texts.len() + 1);
        prop_assert_eq!(&flat, &single.concat());
        let (small, small_offsets) = bpe.encode_flat_u16(&texts, threads);
        prop_assert_eq!(small_offsets, offsets);
        prop_assert!(small.iter().map(|&id| u32::from(id)).eq(flat));
        for (text, ids) in texts.iter().zip(&single) {
            prop_assert!(bpe.encode_u16(text).iter().map(|&id| u32::from(id)).eq(ids.iter().copied()));
        }
    }
}

/// Enough different pieces to fill the cache, from several threads at once.
#[test]
fn a_full_cache_changes_nothing() {
    let word = |i: u64| {
        let number = i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 30;
        let letters = (0..7).map(|at| char::from(b'a' + (number >> (5 * at) & 15) as u8));
        letters.collect::<String>()
    };
    let words: Vec<String> = (0..300_000).map(word).collect();
    let text = words.join(" ");
    let merges = train([&text[..200_000]], 500, Pattern::Qwen2, 1).unwrap();
    let bpe = Bpe::new(merges.clone(), Pattern::Qwen2).unwrap();
    let fresh = |text: &str| {
        Bpe::new(merges.clone(), Pattern::Qwen2)
            .unwrap()
            .encode(text)
    };
    let expected = fresh(&text);
    let sample = reference::encode(&text[..20_000], &merges, Pattern::Qwen2);
    assert_eq!(fresh(&text[..20_000]), sample);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                assert_eq!(bpe.encode(&text), expected);
                assert_eq!(bpe.encode(&text), expected);
            });
        }
    });
    assert_eq!(bpe.decode(&expected).unwrap(), text.as_bytes());
}

/// A bound on the work, not on the time: a text twice as long has at most about
/// twice the ids to compute, and none of these may hang.
#[test]
fn hostile_texts_come_back() {
    let merges = train(
        ["aaaa bbbb abab the of and \n\n\n    "],
        100,
        Pattern::Qwen2,
        1,
    )
    .unwrap();
    let bpe = Bpe::new(merges.clone(), Pattern::Qwen2).unwrap();
    for unit in [
        "a",
        " ",
        "\n",
        "7",
        "\u{1f600}",
        "\u{4e2d}",
        "e\u{301}",
        "\u{fffd}",
        "aB",
        "ab",
    ] {
        let text = unit.repeat(200_000 / unit.len());
        let ids = bpe.encode(&text);
        assert_eq!(bpe.decode(&ids).unwrap(), text.as_bytes());
        let start = &text[..unit.len() * (2000 / unit.len())];
        assert_eq!(
            bpe.encode(start),
            reference::encode(start, &merges, Pattern::Qwen2)
        );
    }
}

/// Windows must grow beyond what pieces are remembered at where tokens are long.
#[test]
fn runs_of_long_tokens_equal_the_reference() {
    let space = u32::from(b' ');
    let mut merges = vec![(space, space)];
    merges.extend((256..262).map(|id| (id, id))); // up to 128 spaces
    merges.push((261, 260)); // 64 and 32
    let bpe = Bpe::new(merges.clone(), Pattern::Qwen2).unwrap();
    for len in [95, 96, 160, 500, 1001, 4000] {
        let text = [" ".repeat(len), "x".into(), " ".repeat(2 * len)].concat();
        let expected = reference::encode(&text, &merges, Pattern::Qwen2);
        assert_eq!(bpe.encode(&text), expected);
        assert_eq!(bpe.encode(&text), expected); // now from the cache
    }
}

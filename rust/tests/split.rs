//! The scanners give the pieces of the published regexes.

use std::io::Read;
use std::path::Path;

use fledge_bpe::{reference, split, ErrorKind, Pattern};
use proptest::prelude::*;

/// Characters that some rule treats in a way of its own, and their neighbours.
const ALPHABET: &[char] = &[
    '\'',
    '\'',
    '\'',
    ' ',
    ' ',
    ' ',
    '\n',
    '\n',
    '\r',
    '\t',
    '\u{b}',
    '\u{85}',
    '\u{a0}',
    '\u{1680}',
    '\u{2003}',
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
    'Z',
    '0',
    '1',
    '9',
    '\u{b2}',
    '\u{663}',
    '\u{967}',
    '\u{2164}',
    '\u{1d7ce}',
    '\u{301}',
    '\u{20dd}',
    '\u{939}',
    '\u{93f}',
    '\u{94d}',
    '\u{e01}',
    '\u{e31}',
    '\u{1c5}',
    '\u{1f88}',
    '\u{2b0}',
    '\u{aa}',
    '\u{17f}',
    '\u{212a}',
    '\u{df}',
    '\u{c9}',
    '\u{436}',
    '\u{416}',
    '\u{4e2d}',
    '\u{6587}',
    '\u{ac00}',
    '\u{5d0}',
    '\u{10400}',
    '\u{10428}',
    '\u{20000}',
    '/',
    '/',
    '!',
    '.',
    '-',
    '_',
    '\0',
    '\u{7f}',
    '\u{2019}',
    '\u{201c}',
    '\u{ff0c}',
    '\u{3002}',
    '\u{1f600}',
    '\u{200d}',
    '\u{fe0f}',
    '\u{10ffff}',
    '\u{e000}',
];

fn texts() -> impl Strategy<Value = String> {
    let from = |alphabet: &'static [char], size| {
        prop::collection::vec(prop::sample::select(alphabet), 0..size)
            .prop_map(|chars| chars.into_iter().collect::<String>())
    };
    let few: &[char] = &[
        '\'', ' ', '\n', 's', 'l', 'L', '1', '!', '/', '\u{301}', '\u{4e2d}',
    ];
    let ascii: &[char] = &[
        'a', 'B', 'c', 's', 't', 'r', 'e', 'l', ' ', ' ', '\n', '\'', '1', '2', '.', '/', '\t',
    ];
    let latin: &[char] = &[
        'a',
        'E',
        '\u{e9}',
        '\u{c9}',
        ' ',
        ' ',
        '\u{a0}',
        '\u{2019}',
        '\u{3000}',
        '\'',
        's',
        '\n',
        '\u{660}',
        '1',
        '\u{416}',
        '\u{436}',
        '!',
        '\u{1f600}',
    ];
    prop_oneof![
        from(ALPHABET, 200),
        from(few, 200),
        from(ascii, 400),
        from(latin, 300),
        ".*",
        // runs, long enough to fill whole blocks
        prop::collection::vec((prop::sample::select(ALPHABET), 1usize..90), 0..12).prop_map(
            |runs| runs
                .iter()
                .flat_map(|&(c, n)| std::iter::repeat_n(c, n))
                .collect()
        ),
    ]
}

#[track_caller]
fn assert_pieces(text: &str, pattern: Pattern) {
    let expected = reference::split(text, pattern);
    let pieces: Vec<&str> = split(text, pattern).collect();
    assert!(
        pieces == expected,
        "{}: {:?}",
        pattern.name(),
        pieces
            .iter()
            .zip(&expected)
            .enumerate()
            .find(|(_, (a, b))| a != b)
            .map(|(i, difference)| (difference, &expected[i.saturating_sub(3)..i]))
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(
        std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(500)
    ))]

    #[test]
    fn fuzzed_text(text in texts()) {
        for pattern in Pattern::ALL {
            assert_pieces(&text, pattern);
        }
    }

    #[test]
    fn ends_are_those_of_the_pieces(text in texts()) {
        for pattern in Pattern::ALL {
            let mut ends = split(&text, pattern);
            let mut start = 0;
            for piece in split(&text, pattern) {
                let end = ends.next_end().unwrap();
                assert_eq!(&text[start..end], piece);
                start = end;
            }
            assert_eq!(ends.next_end(), None);
            assert_eq!(ends.next_end(), None);
        }
    }
}

#[test]
fn every_character_in_many_contexts() {
    for pattern in Pattern::ALL {
        let mut text = String::new();
        for c in '\0'..=char::MAX {
            // Planes without letters, and CJK beyond the first plane: a sample is enough.
            let sampled = matches!(c, '\u{20000}'..='\u{DFFFF}' | '\u{E1000}'..);
            if sampled && !(c as u32).is_multiple_of(127) && c != char::MAX {
                continue;
            }
            for part in [
                "a",
                "b ",
                "A",
                " ",
                "",
                "!",
                "1",
                "\u{301}",
                "\n",
                "'s",
                " '",
                "12\u{4e2d}",
                "  ",
                "/",
                "a'",
                "  \n ",
            ] {
                text.push(c);
                text.push_str(part);
            }
            if text.len() > 1 << 16 || c == char::MAX {
                assert_pieces(&text, pattern);
                text.clear();
            }
        }
    }
}

/// The texts of `../shared/data/tokenizer_texts`, or why there are none.
fn real_texts() -> Result<Vec<(String, String)>, String> {
    let root = std::env::var("FLEDGE_DATA")
        .unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/data").to_owned());
    let folder = Path::new(&root).join("tokenizer_texts");
    let Ok(files) = folder.read_dir() else {
        return Err(format!("there is no folder {}", folder.display()));
    };
    let mut texts = Vec::new();
    for file in files.filter_map(Result::ok) {
        let mut text = String::new();
        let packed = std::fs::File::open(file.path()).unwrap();
        flate2::read::GzDecoder::new(packed)
            .read_to_string(&mut text)
            .unwrap();
        texts.push((file.file_name().to_string_lossy().into_owned(), text));
    }
    Ok(texts)
}

#[test]
fn real_texts_of_many_scripts() {
    match real_texts() {
        Err(why) => eprintln!("skipped: {why}"),
        Ok(texts) => {
            for (_, text) in texts {
                for pattern in Pattern::ALL {
                    assert_pieces(&text, pattern);
                }
            }
        }
    }
}

#[test]
fn custom_regex() {
    let pieces =
        |text, regex| -> Vec<&str> { split(text, Pattern::custom(regex).unwrap()).collect() };
    assert_eq!(pieces("ab12 c", r"\d"), ["ab", "1", "2", " c"]);
    assert_eq!(pieces("abc", r"x*"), ["a", "b", "c"]); // empty matches cut, and end
    assert_eq!(pieces("", r"x*"), [""; 0]);
    assert_eq!(pieces("a.b", r"(?=\.)"), ["a", ".b"]);
    let same = Pattern::custom(r"\d").unwrap();
    assert_eq!(same, Pattern::custom(r"\d").unwrap());
    assert_eq!(same.name(), r"regex:\d");
    assert_eq!(same.name().parse::<Pattern>().unwrap(), same);
    assert_eq!(
        Pattern::custom("(").unwrap_err().kind(),
        ErrorKind::InvalidRegex
    );
    // An engine that gives up leaves one last piece.
    let text = format!("x {}!", "a".repeat(60));
    let all: String = split(&text, Pattern::custom(r"x|(a|a|aa)+(?<!b)$(?=c)").unwrap()).collect();
    assert_eq!(all, text);
}

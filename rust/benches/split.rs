//! Finding piece ends: `cargo bench --bench split`.
//!
//! `blocks` is what training and encoding use, `one_by_one` the readable scanner, `regex` the
//! published regex (on a part of the text, it is slow), `utf8_check` a plain validation pass over
//! the same bytes.

use std::hint::black_box;
use std::io::Read;
use std::path::Path;

use criterion::{criterion_group, criterion_main, Criterion, Throughput};
use fledge_bpe::{reference, split, Pattern};

/// About a megabyte of a file of the shared data, or of the stand-in if there is no such file.
fn text(file: &str, stand_in: &str) -> String {
    let root = std::env::var("FLEDGE_DATA")
        .unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/data").to_owned());
    let path = Path::new(&root).join("tokenizer_texts").join(file);
    let mut text = String::new();
    if let Ok(packed) = std::fs::File::open(path) {
        flate2::read::GzDecoder::new(packed)
            .read_to_string(&mut text)
            .expect("a gzip file");
    } else {
        text.push_str(stand_in);
    }
    text.repeat((1 << 20) / text.len() + 1)
}

fn benches(c: &mut Criterion) {
    let hindi = "\u{938}\u{92d}\u{940} \u{92e}\u{928}\u{941}\u{937}\u{94d}\u{92f}\u{94b}\u{902} \u{915}\u{94b} \u{92d}\u{93e}\u{930}\u{924}\u{964} ";
    let russian = "\u{412}\u{441}\u{435} \u{43b}\u{44e}\u{434}\u{438} \u{440}\u{43e}\u{436}\u{434}\u{430}\u{44e}\u{442}\u{441}\u{44f}, ";
    let texts = [
        (
            "english",
            text(
                "english_wikipedia.txt.gz",
                "It's a plain sentence, isn't it? ",
            ),
        ),
        (
            "code",
            text(
                "code_rust.txt.gz",
                "fn main() {\n    println!(\"{}\", 1 + 23);\n}\n",
            ),
        ),
        (
            "chinese",
            text(
                "chinese.txt.gz",
                "\u{4f60}\u{597d}\u{ff0c}\u{4e16}\u{754c}\u{3002}",
            ),
        ),
        ("hindi", hindi.repeat(10000)),
        ("russian", russian.repeat(10000)),
    ];
    for (name, text) in &texts {
        let mut group = c.benchmark_group(*name);
        group.throughput(Throughput::Bytes(text.len() as u64));
        for pattern in [Pattern::Qwen2, Pattern::Qwen2Marks, Pattern::O200k] {
            group.bench_function(format!("blocks/{}", pattern.name()), |b| {
                b.iter(|| {
                    let mut pieces = split(black_box(text), pattern);
                    let mut sum = 0;
                    while let Some(end) = pieces.next_end() {
                        sum ^= end;
                    }
                    sum
                });
            });
            group.bench_function(format!("one_by_one/{}", pattern.name()), |b| {
                b.iter(|| reference::scan(black_box(text), pattern).len());
            });
        }
        group.bench_function("utf8_check", |b| {
            b.iter(|| std::str::from_utf8(black_box(text.as_bytes())).is_ok());
        });
        let mut end = text.len() / 20;
        while !text.is_char_boundary(end) {
            end += 1;
        }
        group.throughput(Throughput::Bytes(end as u64));
        group.bench_function("regex/qwen2", |b| {
            b.iter(|| reference::split(black_box(&text[..end]), Pattern::Qwen2).len());
        });
    }
}

criterion_group!(group, benches);
criterion_main!(group);

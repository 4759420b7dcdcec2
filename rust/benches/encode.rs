//! Encoding and decoding: `cargo bench --bench encode`.
//!
//! A vocabulary of 8,192 tokens learnt from other text than the one that is encoded. `warm` has
//! met every piece, `cold` is the first pass of a new `Bpe`, `short` is 2 KB a call; `utf8_check`
//! is a plain validation pass over the same bytes, and `copy` a copy of them.

use std::hint::black_box;
use std::io::Read;
use std::path::Path;

use criterion::{criterion_group, criterion_main, BatchSize, Criterion, Throughput};
use fledge_bpe::{train, Bpe, Pattern};

const MERGES: usize = 8192 - 256;
const SHORT_BYTES: usize = 2048;

/// A file of the shared data, or a stand-in if there is no such file.
fn text(file: &str) -> String {
    let root = std::env::var("FLEDGE_DATA")
        .unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/data").to_owned());
    let path = Path::new(&root).join("tokenizer_texts").join(file);
    let mut text = String::new();
    match std::fs::File::open(path) {
        Ok(packed) => {
            let mut unpacked = flate2::read::GzDecoder::new(packed);
            unpacked.read_to_string(&mut text).expect("a gzip file");
        }
        Err(_) => text = "It's a plain sentence, isn't it? No. ".repeat(5000),
    }
    text
}

fn cut(text: &str) -> Vec<&str> {
    let (mut parts, mut start) = (Vec::new(), 0);
    while start < text.len() {
        let mut end = (start + SHORT_BYTES).min(text.len());
        while !text.is_char_boundary(end) {
            end += 1;
        }
        parts.push(&text[start..end]);
        start = end;
    }
    parts
}

fn benches(c: &mut Criterion) {
    let learn_from = ["english_books.txt.gz", "english_speeches.txt.gz"].map(text);
    let learn_from = learn_from.iter().map(String::as_str);
    let merges = train(learn_from, MERGES, Pattern::Qwen2, 1).expect("texts can be counted");
    let bpe = Bpe::new(merges.clone(), Pattern::Qwen2).expect("merges of training");
    for file in ["english_wikipedia", "code_rust", "chinese"] {
        let text = text(&format!("{file}.txt.gz"));
        let ids = bpe.encode(&text);
        let mut group = c.benchmark_group(file);
        group.throughput(Throughput::Bytes(text.len() as u64));
        group.bench_function("warm/u16", |b| b.iter(|| bpe.encode_u16(black_box(&text))));
        group.bench_function("warm/u32", |b| b.iter(|| bpe.encode(black_box(&text))));
        group.bench_function("warm/count", |b| b.iter(|| bpe.count(black_box(&text))));
        group.bench_function("cold/u16", |b| {
            b.iter_batched(
                || Bpe::new(merges.clone(), Pattern::Qwen2).expect("merges of training"),
                |bpe| bpe.encode_u16(black_box(&text)),
                BatchSize::PerIteration,
            );
        });
        let parts = cut(&text);
        group.bench_function("short/u16", |b| {
            b.iter(|| {
                let ids = parts
                    .iter()
                    .map(|part| bpe.encode_u16(black_box(part)).len());
                ids.sum::<usize>()
            });
        });
        group.bench_function("decode", |b| b.iter(|| bpe.decode(black_box(&ids))));
        group.bench_function("utf8_check", |b| {
            b.iter(|| std::str::from_utf8(black_box(text.as_bytes())).is_ok());
        });
        group.bench_function("copy", |b| b.iter(|| black_box(&text).clone()));
    }
}

criterion_group!(group, benches);
criterion_main!(group);

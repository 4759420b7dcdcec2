//! Training: `cargo bench --bench train`.
//!
//! Counting (by bytes of text) and learning 4,096 merges (of all pieces) on a few megabytes of
//! text, made here so that the bench needs no files; English prose of real size is measured by
//! `fledge tok bench --parts train`.

use std::hint::black_box;

use criterion::{criterion_group, criterion_main, Criterion, Throughput};
use fledge_bpe::{learn, Counter, Pattern};

/// Words from syllables, the short and early ones far more often than the rest.
fn text(len: usize) -> String {
    const SYLLABLES: [&str; 16] = [
        "the", "of", "an", "in", "er", "ing", "re", "st", "on", "al", "it", "com", "pro", "ly",
        "ex", "ment",
    ];
    let mut text = String::with_capacity(len + 32);
    let mut state = 1u64;
    while text.len() < len {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let mut bits = state >> 20;
        text.push(' ');
        for _ in 0..1 + (state >> 61) / 2 {
            // The smaller of two draws: early syllables are more frequent.
            let draw = (bits & 15).min(bits >> 4 & 15);
            text.push_str(SYLLABLES[draw as usize]);
            bits >>= 8;
        }
    }
    text
}

fn benches(c: &mut Criterion) {
    let text = text(4 << 20);
    let mut group = c.benchmark_group("train");
    group.sample_size(10);
    group.throughput(Throughput::Bytes(text.len() as u64));
    for threads in [1, 2] {
        group.bench_function(format!("count/{threads}_threads"), |b| {
            b.iter(|| {
                let mut counter = Counter::new(Pattern::Qwen2, threads);
                counter
                    .add(&[black_box(&text)])
                    .expect("nothing is spilled");
                counter.finish().expect("complete")
            });
        });
    }
    let mut counter = Counter::new(Pattern::Qwen2, 2);
    counter.add(&[&text]).expect("nothing is spilled");
    let pieces = counter.finish().expect("complete");
    group.throughput(Throughput::Elements(pieces.len() as u64));
    group.bench_function("learn/4096", |b| {
        b.iter(|| learn(black_box(&pieces), 4096).expect("small enough"));
    });
}

criterion_group!(group, benches);
criterion_main!(group);

//! The phases of one decode step: from the tokens of a few rows to their logits.
//!
//! Each layer is five phases: queries, keys and values; attention; its output
//! and the residual; the gated half of the feed-forward layer; the other half
//! and the residual. Then the head. A phase begins when all units of the one
//! before are done, so what every thread needs (a normed row, the merged heads) each
//! makes for itself: that costs less than another phase. Called by `py_step`.
//! The readable twin is Python's `fledge.engine.runner.Runner`; tests there
//! hold the two equal.

use std::ops::Range;
use std::slice;

use crate::error::{Error, ErrorKind};
use crate::nn::kernels::{merge, norm, product, rotate, share, spend, swiglu, Inputs, CHUNK};
use crate::nn::pack::{invalid, Format, Matrix, Model, Numbers, Shape, Weights, TILE};
use crate::nn::plan::{Cache, Plan, Row, Task};
#[cfg(target_arch = "x86_64")]
use crate::nn::simd::{Avx2, Avx512};
use crate::nn::simd::{Level, Plain, Simd, LANES};
use crate::nn::team::Team;

/// Phases of a layer.
const PHASES: usize = 5;

/// What a thread keeps for itself.
#[derive(Default)]
struct Own {
    inputs: Inputs,
    queries: Vec<f32>,
    scores: Vec<[f32; CHUNK]>,
}

/// Memory that all threads share; kept from step to step.
#[derive(Default)]
struct Scratch {
    stream: Vec<f32>, // [rows, hidden]
    qkv: Vec<f32>,    // [rows, tiles x TILE]
    parts: Vec<f32>,  // of every row: [parts, heads, head_dim + 2]
    inner: Vec<f32>,  // [rows, inner, padded]
}

/// A packed model and the threads that run it.
pub struct Stepper {
    model: Model,
    level: Level,
    team: Team<Own>,
    scratch: Scratch,
}

/// One step as all threads see it.
struct Frame<'a> {
    model: &'a Model,
    level: Level,
    cache: &'a Cache,
    rows: &'a [Row],
    plan: Plan,
    stream: *mut f32,
    qkv: *mut f32,
    parts: *mut f32,
    inner: *mut f32,
    logits: *mut f32,
}

// SAFETY: the pointers are memory that `Stepper::step` holds exclusively; which thread writes
// where is decided by the units that it took, and phases keep readers and writers apart.
unsafe impl Sync for Frame<'_> {}

impl Stepper {
    /// Packs a model for `threads` threads, the caller's among them.
    pub fn new(s: Shape, w: &Weights, format: Format, threads: usize) -> Result<Stepper, Error> {
        Stepper::at_level(s, w, format, threads, Level::detect())
    }

    fn at_level(
        shape: Shape,
        weights: &Weights,
        format: Format,
        threads: usize,
        level: Level,
    ) -> Result<Stepper, Error> {
        if !(1..=1024).contains(&threads) {
            return Err(invalid(format!("{threads} threads")));
        }
        let model = Model::pack(shape, weights, format)?;
        Ok(Stepper {
            model,
            level,
            team: Team::new(threads),
            scratch: Scratch::default(),
        })
    }

    /// Reads one token of every row: stores its keys and values, and gives its logits.
    ///
    /// `embedding` [vocab, hidden], `logits` [rows, vocab]. A row's result does not depend, to
    /// the bit, on the other rows or on the number of threads.
    pub fn step(
        &mut self,
        embedding: &[f32],
        cache: &Cache,
        rows: &[Row],
        logits: &mut [f32],
    ) -> Result<(), Error> {
        let (model, s) = (&self.model, self.model.shape);
        let plan = Plan::new(&s, cache, rows)?;
        if embedding.len() != s.vocab_size * s.hidden_size {
            return Err(invalid("the embedding has another shape"));
        }
        if logits.len() != rows.len() * s.vocab_size {
            return Err(invalid("the logits have another shape"));
        }
        let first = &model.layers[0];
        let part_count = plan.first_part[rows.len()];
        let scratch = &mut self.scratch;
        scratch.stream.clear();
        for row in rows {
            scratch
                .stream
                .extend(&embedding[row.token * s.hidden_size..][..s.hidden_size]);
        }
        scratch.qkv.resize(rows.len() * first.qkv.tiles * TILE, 0.0);
        scratch
            .parts
            .resize(part_count * s.heads * (s.head_dim + 2), 0.0);
        scratch.inner.resize(rows.len() * first.down.width, 0.0);
        let layer = [
            first.qkv.tiles,
            plan.tasks.len(),
            first.out.tiles,
            first.gated.tiles,
            first.down.tiles,
        ];
        let totals = (0..s.layers * PHASES)
            .map(|i| layer[i % PHASES])
            .chain([model.head.tiles]);
        let frame = Frame {
            model,
            level: self.level,
            cache,
            rows,
            plan,
            stream: scratch.stream.as_mut_ptr(),
            qkv: scratch.qkv.as_mut_ptr(),
            parts: scratch.parts.as_mut_ptr(),
            inner: scratch.inner.as_mut_ptr(),
            logits: logits.as_mut_ptr(),
        };
        let fine = self
            .team
            .run(totals, &|phase, range, is_first, own: &mut Own| {
                frame.work(phase, range, is_first, own);
            });
        if fine {
            Ok(())
        } else {
            Err(Error::new(ErrorKind::Panicked, "a decode step panicked"))
        }
    }
}

impl Frame<'_> {
    /// Units `range` of a phase, by what the processor has.
    fn work(&self, phase: usize, range: Range<usize>, is_first: bool, own: &mut Own) {
        match self.level {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Level::detect` found these features.
            Level::Avx512 => unsafe { work_avx512(self, phase, range, is_first, own) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Level::Avx2 => unsafe { work_avx2(self, phase, range, is_first, own) },
            // SAFETY: plain Rust asks for nothing.
            _ => unsafe { self.work_with::<Plain>(phase, range, is_first, own) },
        }
    }

    /// # Safety
    ///
    /// The processor has what S names; the units are this thread's alone, and every phase before
    /// this one is done.
    #[inline(always)]
    unsafe fn work_with<S: Simd>(
        &self,
        phase: usize,
        range: Range<usize>,
        is_first: bool,
        own: &mut Own,
    ) {
        let (s, index) = (&self.model.shape, phase / PHASES);
        let d = s.hidden_size;
        if index == s.layers {
            let head = &self.model.head;
            if is_first {
                self.normed::<S>(head, Some(&self.model.norm), own);
            }
            return self.products::<S>(
                head,
                range,
                own,
                self.logits,
                s.vocab_size,
                s.vocab_size,
                false,
            );
        }
        let layer = &self.model.layers[index];
        match phase % PHASES {
            0 => {
                if is_first {
                    self.normed::<S>(&layer.qkv, None, own);
                }
                let width = layer.qkv.tiles * TILE;
                self.products::<S>(&layer.qkv, range, own, self.qkv, width, width, false);
            }
            1 => {
                for tasks in self.plan.tasks[range].chunk_by(Task::same_keys) {
                    self.attention::<S>(index, tasks, own);
                }
            }
            2 => {
                if is_first {
                    self.merged(&layer.out, own);
                }
                self.products::<S>(&layer.out, range, own, self.stream, d, d, true);
            }
            3 => {
                if is_first {
                    self.normed::<S>(&layer.gated, None, own);
                }
                self.gated::<S>(&layer.gated, layer.down.width, range, own);
            }
            _ => {
                if is_first {
                    let width = layer.down.width;
                    own.inputs.shape(self.rows.len(), width, width);
                    let inner = slice::from_raw_parts(self.inner, self.rows.len() * width);
                    own.inputs.floats.copy_from_slice(inner);
                    round_for(&layer.down, &mut own.inputs);
                }
                self.products::<S>(&layer.down, range, own, self.stream, d, d, true);
            }
        }
    }

    /// The normed stream as inputs of a matrix.
    #[inline(always)]
    unsafe fn normed<S: Simd>(&self, matrix: &Matrix, gain: Option<&[f32]>, own: &mut Own) {
        let (s, inputs) = (&self.model.shape, &mut own.inputs);
        let d = s.hidden_size;
        inputs.shape(self.rows.len(), matrix.width, d);
        for (r, to) in inputs.floats.chunks_exact_mut(matrix.width).enumerate() {
            let x = slice::from_raw_parts(self.stream.add(r * d), d);
            norm::<S>(x, gain, s.eps, &mut to[..d]);
        }
        round_for(matrix, inputs);
    }

    /// What attention gave, as inputs of its output matrix.
    #[inline(always)]
    unsafe fn merged(&self, matrix: &Matrix, own: &mut Own) {
        let (s, inputs) = (&self.model.shape, &mut own.inputs);
        inputs.shape(self.rows.len(), matrix.width, s.attended());
        let size = s.head_dim + 2;
        let stride = s.heads * size; // from one part of a head to the next
        for (r, to) in inputs.floats.chunks_exact_mut(matrix.width).enumerate() {
            let (first, end) = (self.plan.first_part[r], self.plan.first_part[r + 1]);
            let parts =
                slice::from_raw_parts(self.parts.add(first * stride), (end - first) * stride);
            for (head, to) in to[..s.attended()].chunks_exact_mut(s.head_dim).enumerate() {
                merge(&parts[head * size..], stride, to);
            }
        }
        round_for(matrix, inputs);
    }

    /// Outputs of tiles `range`, written (or added) to `to` [rows, stride], of which `used` are
    /// outputs and not padding.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)] // all of them are numbers of one product
    unsafe fn products<S: Simd>(
        &self,
        matrix: &Matrix,
        range: Range<usize>,
        own: &Own,
        to: *mut f32,
        stride: usize,
        used: usize,
        add: bool,
    ) {
        let mut out = [0.0; 4 * TILE];
        for tile in range {
            let count = TILE.min(used - tile * TILE);
            let mut first = 0;
            while first < self.rows.len() {
                let rows = S::ROWS.min(self.rows.len() - first);
                product::<S>(matrix, tile, &own.inputs, first, rows, &mut out);
                for r in 0..rows {
                    let at = to.add((first + r) * stride + tile * TILE);
                    let to = slice::from_raw_parts_mut(at, count);
                    let from = &out[r * TILE..][..count];
                    if add {
                        to.iter_mut().zip(from).for_each(|(t, f)| *t += f);
                    } else {
                        to.copy_from_slice(from);
                    }
                }
                first += rows;
            }
        }
    }

    /// The gated half of the feed-forward layer: 16 numbers of each tile.
    #[inline(always)]
    unsafe fn gated<S: Simd>(
        &self,
        matrix: &Matrix,
        stride: usize,
        range: Range<usize>,
        own: &Own,
    ) {
        let mut out = [0.0; 4 * TILE];
        for tile in range {
            let mut first = 0;
            while first < self.rows.len() {
                let rows = S::ROWS.min(self.rows.len() - first);
                product::<S>(matrix, tile, &own.inputs, first, rows, &mut out);
                for r in 0..rows {
                    let to = self.inner.add((first + r) * stride + tile * LANES);
                    swiglu::<S>(out[r * TILE..].as_ptr(), to);
                }
                first += rows;
            }
        }
    }

    /// Tasks of attention over the same keys: of all their queries first the shares of the keys,
    /// then the values.
    #[inline(always)]
    unsafe fn attention<S: Simd>(&self, index: usize, tasks: &[Task], own: &mut Own) {
        let (s, qkv) = (&self.model.shape, self.model.layers[index].qkv.tiles * TILE);
        let (n, group) = (s.head_dim, s.heads / s.kv_heads);
        let (keys, values) = self.cache.layer(index);
        let Task {
            head,
            slot,
            start,
            count,
            ..
        } = tasks[0];
        let at = self.cache.place(s, slot, head, start);
        own.queries.resize(n, 0.0);
        own.scores.resize(tasks.len() * group, [0.0; CHUNK]);
        for (task, scores) in tasks.iter().zip(own.scores.chunks_exact_mut(group)) {
            let row = self.qkv.add(task.row * qkv);
            if task.newest {
                self.remember::<S>(index, task, row);
            }
            for (i, scores) in scores.iter_mut().enumerate() {
                let query = slice::from_raw_parts(row.add((head * group + i) * n), n);
                let scale = 1.0 / (n as f32).sqrt();
                let gain = &self.model.layers[index].q_norm;
                self.turned::<S>(query, gain, task.row, scale, &mut own.queries);
                let out = self.part(task, head * group + i);
                share::<S>(own.queries.as_ptr(), keys.add(at), n, count, scores, out);
            }
        }
        for (task, scores) in tasks.iter().zip(own.scores.chunks_exact(group)) {
            for (i, scores) in scores.iter().enumerate() {
                let out = self.part(task, head * group + i);
                spend::<S>(&scores[..count], values.add(at), n, out);
            }
        }
    }

    /// Where the partial result of a task goes, of one query head.
    #[inline(always)]
    unsafe fn part(&self, task: &Task, head: usize) -> *mut f32 {
        let s = &self.model.shape;
        let part = self.plan.first_part[task.row] + task.index;
        self.parts.add((part * s.heads + head) * (s.head_dim + 2))
    }

    /// Stores the newest key and value of a row; `row` are its queries, keys and values.
    #[inline(always)]
    unsafe fn remember<S: Simd>(&self, index: usize, task: &Task, row: *const f32) {
        let (s, n) = (&self.model.shape, self.model.shape.head_dim);
        let (keys, values) = self.cache.layer(index);
        let at = self
            .cache
            .place(s, task.slot, task.head, self.rows[task.row].position);
        let key = slice::from_raw_parts(row.add((s.heads + task.head) * n), n);
        let gain = &self.model.layers[index].k_norm;
        let to = slice::from_raw_parts_mut(keys.add(at), n);
        self.turned::<S>(key, gain, task.row, 1.0, to);
        let value = row.add((s.heads + s.kv_heads + task.head) * n);
        values.add(at).copy_from_nonoverlapping(value, n);
    }

    /// A head of a row normed, rotated to the row's position, and scaled.
    #[inline(always)]
    unsafe fn turned<S: Simd>(
        &self,
        head: &[f32],
        gain: &[f32],
        row: usize,
        scale: f32,
        to: &mut [f32],
    ) {
        let half = head.len() / 2;
        let first = self.rows[row].position * half;
        let cos = &self.model.cos[first..][..half];
        let sin = &self.model.sin[first..][..half];
        norm::<S>(head, Some(gain), self.model.shape.eps, to);
        rotate(to, cos, sin, scale);
    }
}

#[inline(always)]
fn round_for(matrix: &Matrix, inputs: &mut Inputs) {
    if matches!(matrix.numbers, Numbers::Int8 { .. }) {
        inputs.round();
    }
}

/// # Safety
///
/// As [`Frame::work_with`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")]
unsafe fn work_avx512(
    frame: &Frame,
    phase: usize,
    range: Range<usize>,
    first: bool,
    own: &mut Own,
) {
    frame.work_with::<Avx512>(phase, range, first, own);
}

/// # Safety
///
/// As [`Frame::work_with`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn work_avx2(frame: &Frame, phase: usize, range: Range<usize>, first: bool, own: &mut Own) {
    frame.work_with::<Avx2>(phase, range, first, own);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::pack::LayerWeights;
    use crate::nn::plan::Part;

    const SHAPE: Shape = Shape {
        vocab_size: 70,
        hidden_size: 40,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 18,
        inner: 50,
        positions: 300,
        eps: 1e-5,
    };
    const SLOTS: usize = 4;

    /// Numbers of order 1, the same every time.
    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        (0..count)
            .map(|i| ((i * 7919 + seed * 104_729) as f32).sin() * 0.3)
            .collect()
    }

    struct Owned(Vec<Vec<f32>>);

    impl Owned {
        fn new() -> Owned {
            let s = SHAPE;
            let (d, q, k) = (s.hidden_size, s.attended(), s.kv_heads * s.head_dim);
            let n = s.head_dim;
            let one = [
                d,
                q * d,
                k * d,
                k * d,
                q * d,
                n,
                n,
                d,
                s.inner * d,
                s.inner * d,
                s.inner * d,
            ];
            let half = s.positions * n / 2;
            let rest = [d, s.vocab_size * d, half, half, s.vocab_size * d];
            let counts = one.iter().cycle().take(11 * s.layers).chain(&rest);
            Owned(counts.enumerate().map(|(i, n)| numbers(*n, i)).collect())
        }

        fn stepper(&self, format: Format, threads: usize, level: Level) -> Stepper {
            let at = |i: usize| self.0[i].as_slice();
            let layer = |l: usize| LayerWeights {
                input_norm: at(11 * l),
                q: at(11 * l + 1),
                k: at(11 * l + 2),
                v: at(11 * l + 3),
                o: at(11 * l + 4),
                q_norm: at(11 * l + 5),
                k_norm: at(11 * l + 6),
                post_norm: at(11 * l + 7),
                gate: at(11 * l + 8),
                up: at(11 * l + 9),
                down: at(11 * l + 10),
            };
            let first = 11 * SHAPE.layers;
            let weights = Weights {
                layers: (0..SHAPE.layers).map(layer).collect(),
                norm: at(first),
                head: at(first + 1),
                cos: at(first + 2),
                sin: at(first + 3),
            };
            Stepper::at_level(SHAPE, &weights, format, threads, level).unwrap()
        }

        fn embedding(&self) -> &[f32] {
            &self.0[11 * SHAPE.layers + 4]
        }
    }

    fn rows() -> Vec<Row> {
        let parts = vec![Part {
            slot: 3,
            start: 0,
            end: 150,
        }];
        let row = |token, slot, position| Row {
            token,
            slot,
            position,
            parts: vec![],
        };
        vec![
            row(5, 1, 290),
            row(69, 0, 0),
            Row {
                token: 7,
                slot: 2,
                position: 170,
                parts,
            },
        ]
    }

    /// The logits of `rows`, each row in `together` with the others or by itself.
    fn logits(weights: &Owned, stepper: &mut Stepper, together: bool) -> Vec<f32> {
        let size = SLOTS * SHAPE.kv_heads * SHAPE.positions * SHAPE.head_dim;
        let mut memory: Vec<Vec<f32>> = (0..4).map(|i| numbers(size, 100 + i)).collect();
        let starts: Vec<*mut f32> = memory.iter_mut().map(|m| m.as_mut_ptr()).collect();
        // SAFETY: of that size, and alive and untouched until the steps are done.
        let cache = unsafe {
            Cache::new(
                starts[..2].to_vec(),
                starts[2..].to_vec(),
                SLOTS,
                SHAPE.positions,
            )
        };
        let rows = rows();
        let mut out = vec![0.0; rows.len() * SHAPE.vocab_size];
        if together {
            stepper
                .step(weights.embedding(), &cache, &rows, &mut out)
                .unwrap();
        } else {
            for (row, out) in rows.iter().zip(out.chunks_mut(SHAPE.vocab_size)) {
                let row = std::slice::from_ref(row);
                stepper.step(weights.embedding(), &cache, row, out).unwrap();
            }
        }
        out
    }

    #[test]
    fn every_processor_and_number_of_threads_gives_the_same() {
        let weights = Owned::new();
        for format in [Format::Float32, Format::BFloat16, Format::Int8] {
            let best = Level::detect();
            let expected = logits(&weights, &mut weights.stepper(format, 1, best), true);
            assert!(expected.iter().all(|x| x.is_finite()));
            assert!(expected.iter().any(|x| x.abs() > 0.1));
            for threads in [1, 2, 4] {
                let mut stepper = weights.stepper(format, threads, best);
                for together in [true, false] {
                    assert_eq!(logits(&weights, &mut stepper, together), expected);
                }
            }
            // a rounding to 8 bits that falls the other way is a step of 1/127
            let slack = if format == Format::Int8 { 0.05 } else { 1e-4 };
            let levels: &[Level] = match best {
                Level::Avx512 => &[Level::Plain, Level::Avx2],
                _ => &[Level::Plain],
            };
            for level in levels {
                let got = logits(&weights, &mut weights.stepper(format, 2, *level), true);
                for (a, b) in got.iter().zip(&expected) {
                    assert!((a - b).abs() < slack, "{format:?} {level}: {a} {b}");
                }
            }
        }
    }

    #[test]
    fn memory_of_another_shape_is_refused() {
        let weights = Owned::new();
        let mut stepper = weights.stepper(Format::Float32, 1, Level::Plain);
        let null = std::ptr::null_mut();
        // SAFETY: nothing is read: the shapes are refused first.
        let cache = unsafe { Cache::new(vec![null; 2], vec![null; 2], 4, 9) };
        let rows = rows();
        for (embedding, count, word) in [(2799, 70, "embedding"), (2800, 69, "logits")] {
            let embedding = vec![0.0; embedding];
            let got = stepper.step(&embedding, &cache, &rows[1..2], &mut vec![0.0; count]);
            assert!(got.unwrap_err().to_string().contains(word));
        }
        // SAFETY: as above.
        let cache = unsafe { Cache::new(vec![null], vec![null], 4, 9) };
        let got = stepper.step(&[], &cache, &rows[1..2], &mut []);
        assert!(got.unwrap_err().to_string().contains("layers"));
    }
}

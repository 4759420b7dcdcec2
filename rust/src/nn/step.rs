//! The phases of one decode step: from the tokens of a few rows to their logits.
//!
//! Each layer is five phases: queries, keys and values; attention; its output
//! and the residual; the gated half of the feed-forward layer; the other half
//! and the residual. Then the head. Between phases the threads wait for each
//! other, so what every thread needs (a normed row, the merged heads) each
//! makes for itself: that costs less than another phase. Called by `py_step`.
//! The readable twin is Python's `fledge.engine.runner.Runner`; tests there
//! hold the two equal.

use std::ops::Range;
use std::slice;

use crate::error::{Error, ErrorKind};
use crate::nn::kernels::{attend, merge, norm, product, rotate, swiglu, Inputs};
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

    /// The model's sizes.
    pub fn shape(&self) -> &Shape {
        &self.model.shape
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
            Err(Error::new(ErrorKind::InvalidStep, "a decode step panicked"))
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
                for task in &self.plan.tasks[range] {
                    self.attention::<S>(index, task, own);
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

    /// One task of attention: the queries that share a key head over a stretch of keys.
    #[inline(always)]
    unsafe fn attention<S: Simd>(&self, index: usize, task: &Task, own: &mut Own) {
        let s = &self.model.shape;
        let (layer, n, group) = (&self.model.layers[index], s.head_dim, s.heads / s.kv_heads);
        let position = self.rows[task.row].position;
        let half = n / 2;
        let cos = &self.model.cos[position * half..][..half];
        let sin = &self.model.sin[position * half..][..half];
        let row = self.qkv.add(task.row * layer.qkv.tiles * TILE);
        let (keys, values) = self.cache.layer(index);
        if task.newest {
            let key = slice::from_raw_parts(row.add((s.heads + task.head) * n), n);
            let value = row.add((s.heads + s.kv_heads + task.head) * n);
            let at = self.cache.place(s, task.slot, task.head, position);
            let to = slice::from_raw_parts_mut(keys.add(at), n);
            norm::<S>(key, Some(&layer.k_norm), s.eps, to);
            rotate(to, cos, sin, 1.0);
            values.add(at).copy_from_nonoverlapping(value, n);
        }
        own.queries.resize(n, 0.0);
        let at = self.cache.place(s, task.slot, task.head, task.start);
        let part = self.plan.first_part[task.row] + task.index;
        for head in task.head * group..(task.head + 1) * group {
            let query = slice::from_raw_parts(row.add(head * n), n);
            norm::<S>(query, Some(&layer.q_norm), s.eps, &mut own.queries);
            rotate(&mut own.queries, cos, sin, 1.0 / (n as f32).sqrt());
            let out = self.parts.add((part * s.heads + head) * (n + 2));
            attend::<S>(
                own.queries.as_ptr(),
                keys.add(at),
                values.add(at),
                n,
                task.count,
                out,
            );
        }
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

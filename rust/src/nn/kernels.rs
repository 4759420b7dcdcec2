//! The arithmetic of a step, written once over [`Simd`].
//!
//! Sums of a row are made in one order, whatever other rows there are: a row's
//! bits do not depend on its batch-mates. Called by `step`, which has checked
//! every length; the slow twins are in the tests below.

use crate::nn::pack::{Matrix, Numbers, TILE};
use crate::nn::simd::{Simd, LANES};

/// Keys that one task of attention reads.
pub(crate) const CHUNK: usize = 128;

/// Rows [rows, stride] as a product takes them in.
#[derive(Default)]
pub(crate) struct Inputs {
    pub floats: Vec<f32>,
    bytes: Vec<u8>,
    sizes: Vec<f32>, // of each row: what a byte stands for
    stride: usize,
}

impl Inputs {
    /// Makes room for `rows` of `width` numbers, zero behind `used`.
    pub(crate) fn shape(&mut self, rows: usize, width: usize, used: usize) {
        self.stride = width;
        self.floats.resize(rows * width, 0.0);
        for row in self.floats.chunks_exact_mut(width) {
            row[used..].fill(0.0);
        }
    }

    /// Rounds the rows to bytes, each by its own largest magnitude; 128 stands for 0.
    #[inline(always)]
    pub(crate) fn round(&mut self) {
        self.bytes.resize(self.floats.len(), 0);
        self.sizes.clear();
        let rows = self
            .floats
            .chunks_exact(self.stride)
            .zip(self.bytes.chunks_exact_mut(self.stride));
        for (row, bytes) in rows {
            let mut most = [0.0f32; LANES];
            for part in row.chunks_exact(LANES) {
                for (m, x) in most.iter_mut().zip(part) {
                    *m = if x.abs() > *m { x.abs() } else { *m };
                }
            }
            let largest = most.into_iter().fold(1e-12, f32::max);
            let factor = 127.0 / largest;
            for (byte, x) in bytes.iter_mut().zip(row) {
                *byte = (x * factor + 128.5) as i32 as u8;
            }
            self.sizes.push(largest / 127.0);
        }
    }
}

/// Weights that are widened to floats.
pub(crate) trait Wide: Copy {
    unsafe fn load<S: Simd>(from: *const Self) -> S::V;
}

impl Wide for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const f32) -> S::V {
        S::load(from)
    }
}

impl Wide for u16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u16) -> S::V {
        S::load_half(from)
    }
}

/// Sums of one tile for R rows: two registers of outputs, even and odd inputs apart, so that four
/// sums are under way at a time.
#[inline(always)]
unsafe fn tile_of_floats<S: Simd, W: Wide, const R: usize>(
    weights: *const W,
    width: usize,
    x: *const f32,
    stride: usize,
    out: *mut f32,
) {
    let mut sums = [[S::splat(0.0); 4]; R];
    let mut k = 0;
    while k < width {
        let at = weights.add(k * TILE);
        let w0 = W::load::<S>(at);
        let w1 = W::load::<S>(at.add(LANES));
        let w2 = W::load::<S>(at.add(2 * LANES));
        let w3 = W::load::<S>(at.add(3 * LANES));
        for (r, sums) in sums.iter_mut().enumerate() {
            let even = S::splat(*x.add(r * stride + k));
            let odd = S::splat(*x.add(r * stride + k + 1));
            sums[0] = S::fma(w0, even, sums[0]);
            sums[1] = S::fma(w1, even, sums[1]);
            sums[2] = S::fma(w2, odd, sums[2]);
            sums[3] = S::fma(w3, odd, sums[3]);
        }
        k += 2;
    }
    for (r, sums) in sums.iter().enumerate() {
        S::store(out.add(r * TILE), S::add(sums[0], sums[2]));
        S::store(out.add(r * TILE + LANES), S::add(sums[1], sums[3]));
    }
}

/// The same with bytes: exact sums.
#[inline(always)]
unsafe fn tile_of_bytes<S: Simd, const R: usize>(
    weights: *const i8,
    width: usize,
    x: *const u8,
    stride: usize,
    out: *mut i32,
) {
    let mut sums = [[S::no_bytes(); 4]; R];
    let mut k = 0;
    while k < width {
        let at = weights.add(k * TILE);
        for (r, sums) in sums.iter_mut().enumerate() {
            let from = x.add(r * stride + k).cast::<[u8; 4]>();
            let (even, odd) = (*from, *from.add(1));
            sums[0] = S::dot_bytes(sums[0], even, at);
            sums[1] = S::dot_bytes(sums[1], even, at.add(4 * LANES));
            sums[2] = S::dot_bytes(sums[2], odd, at.add(8 * LANES));
            sums[3] = S::dot_bytes(sums[3], odd, at.add(12 * LANES));
        }
        k += 8;
    }
    for (r, sums) in sums.iter().enumerate() {
        S::store_ints(out.add(r * TILE), S::add_ints(sums[0], sums[2]));
        S::store_ints(out.add(r * TILE + LANES), S::add_ints(sums[1], sums[3]));
    }
}

/// Products of rows `first..first + count` (at most 4, [`Simd::ROWS`]) with tile `tile` of a matrix.
///
/// # Safety
///
/// The processor has what S names. `x` has the shape of the matrix's inputs, and was rounded if
/// the matrix holds bytes; `tile` exists.
#[inline(always)]
pub(crate) unsafe fn product<S: Simd>(
    matrix: &Matrix,
    tile: usize,
    x: &Inputs,
    first: usize,
    count: usize,
    out: &mut [f32; 4 * TILE],
) {
    debug_assert!(x.stride == matrix.width && tile < matrix.tiles && count <= 4);
    let (width, stride) = (matrix.width, x.stride);
    let (at, floats, to) = (
        tile * TILE * width,
        x.floats.as_ptr().add(first * stride),
        out.as_mut_ptr(),
    );
    match &matrix.numbers {
        Numbers::Float32(w) => {
            let w = w.as_ptr().add(at);
            match count {
                1 => tile_of_floats::<S, f32, 1>(w, width, floats, stride, to),
                2 => tile_of_floats::<S, f32, 2>(w, width, floats, stride, to),
                3 => tile_of_floats::<S, f32, 3>(w, width, floats, stride, to),
                _ => tile_of_floats::<S, f32, 4>(w, width, floats, stride, to),
            }
        }
        Numbers::BFloat16(w) => {
            let w = w.as_ptr().add(at);
            match count {
                1 => tile_of_floats::<S, u16, 1>(w, width, floats, stride, to),
                2 => tile_of_floats::<S, u16, 2>(w, width, floats, stride, to),
                3 => tile_of_floats::<S, u16, 3>(w, width, floats, stride, to),
                _ => tile_of_floats::<S, u16, 4>(w, width, floats, stride, to),
            }
        }
        Numbers::Int8 {
            weights,
            scales,
            shifts,
        } => {
            let (w, bytes) = (
                weights.as_ptr().add(at),
                x.bytes.as_ptr().add(first * stride),
            );
            let mut sums = [0; 4 * TILE];
            let to = sums.as_mut_ptr();
            match count {
                1 => tile_of_bytes::<S, 1>(w, width, bytes, stride, to),
                2 => tile_of_bytes::<S, 2>(w, width, bytes, stride, to),
                3 => tile_of_bytes::<S, 3>(w, width, bytes, stride, to),
                _ => tile_of_bytes::<S, 4>(w, width, bytes, stride, to),
            }
            let (scales, shifts) = (
                &scales[tile * TILE..][..TILE],
                &shifts[tile * TILE..][..TILE],
            );
            for r in 0..count {
                let size = x.sizes[first + r];
                for i in 0..TILE {
                    out[r * TILE + i] =
                        (sums[r * TILE + i] - shifts[i]) as f32 * (scales[i] * size);
                }
            }
        }
    }
}

/// x over its root mean square, times `gain` if there is one.
///
/// # Safety
///
/// The processor has what S names.
#[inline(always)]
pub(crate) unsafe fn norm<S: Simd>(x: &[f32], gain: Option<&[f32]>, eps: f32, out: &mut [f32]) {
    let factor = 1.0 / (dot::<S>(x.as_ptr(), x.as_ptr(), x.len()) / x.len() as f32 + eps).sqrt();
    match gain {
        Some(gain) => {
            for ((o, x), g) in out.iter_mut().zip(x).zip(gain) {
                *o = x * factor * g;
            }
        }
        None => {
            for (o, x) in out.iter_mut().zip(x) {
                *o = x * factor;
            }
        }
    }
}

/// Rotates the pairs (2i, 2i + 1) of a head by the angles of a position, and scales it.
#[inline(always)]
pub(crate) fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32], scale: f32) {
    for ((pair, c), s) in head.chunks_exact_mut(2).zip(cos).zip(sin) {
        let (x, y) = (pair[0] * scale, pair[1] * scale);
        pair[0] = x * c - y * s;
        pair[1] = y * c + x * s;
    }
}

/// silu(gate) x up of one tile: its first half is the gate.
///
/// # Safety
///
/// The processor has what S names; `tile` has [`TILE`] numbers, `out` room for [`LANES`].
#[inline(always)]
pub(crate) unsafe fn swiglu<S: Simd>(tile: *const f32, out: *mut f32) {
    let (gate, up) = (S::load(tile), S::load(tile.add(LANES)));
    // e^88 is the last that float32 holds, and the quotient is all but 0 there
    let minus = S::mul(S::max(gate, S::splat(-88.0)), S::splat(-1.0));
    let below = S::add(S::splat(1.0), S::exp(minus));
    S::store(out, S::mul(S::div(gate, below), up));
}

/// Sum of products of n numbers.
#[inline(always)]
unsafe fn dot<S: Simd>(a: *const f32, b: *const f32, n: usize) -> f32 {
    let mut sum = S::splat(0.0);
    let mut i = 0;
    while i + LANES <= n {
        sum = S::fma(S::load(a.add(i)), S::load(b.add(i)), sum);
        i += LANES;
    }
    let mut total = S::sum(sum);
    while i < n {
        total += *a.add(i) * *b.add(i);
        i += 1;
    }
    total
}

/// Scores of one query with four keys that stand one behind the other.
#[inline(always)]
unsafe fn dot4<S: Simd>(q: *const f32, keys: *const f32, n: usize) -> [f32; 4] {
    let mut sums = [S::splat(0.0); 4];
    let mut i = 0;
    while i + LANES <= n {
        let q = S::load(q.add(i));
        for (j, sum) in sums.iter_mut().enumerate() {
            *sum = S::fma(S::load(keys.add(j * n + i)), q, *sum);
        }
        i += LANES;
    }
    let mut total = S::sum4(sums);
    while i < n {
        for (j, total) in total.iter_mut().enumerate() {
            *total += *q.add(i) * *keys.add(j * n + i);
        }
        i += 1;
    }
    total
}

/// Weighted sums of N registers of values: `values` [count, n] from its column `at` on.
#[inline(always)]
unsafe fn weigh<S: Simd, const N: usize>(
    shares: &[f32],
    values: *const f32,
    n: usize,
    at: usize,
    out: *mut f32,
) {
    let mut sums = [S::splat(0.0); N];
    for (j, share) in shares.iter().enumerate() {
        let share = S::splat(*share);
        let from = values.add(j * n + at);
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum = S::fma(S::load(from.add(i * LANES)), share, *sum);
        }
    }
    for (i, sum) in sums.iter().enumerate() {
        S::store(out.add(at + i * LANES), *sum);
    }
}

/// Attention of one scaled query [n] over `count` (1 to [`CHUNK`]) keys and values [count, n].
///
/// `out` [n + 2]: the values weighted by e^(score - most), then `most` and the sum of the weights.
///
/// # Safety
///
/// The processor has what S names; the pointers have that many numbers.
#[inline(always)]
pub(crate) unsafe fn attend<S: Simd>(
    q: *const f32,
    keys: *const f32,
    values: *const f32,
    n: usize,
    count: usize,
    out: *mut f32,
) {
    let mut scores = [f32::NEG_INFINITY; CHUNK];
    let mut j = 0;
    while j + 4 <= count {
        scores[j..j + 4].copy_from_slice(&dot4::<S>(q, keys.add(j * n), n));
        j += 4;
    }
    while j < count {
        scores[j] = dot::<S>(q, keys.add(j * n), n);
        j += 1;
    }
    let used = count.next_multiple_of(LANES);
    let mut most = S::load(scores.as_ptr());
    for part in scores[..used].chunks_exact(LANES) {
        most = S::max(S::load(part.as_ptr()), most);
    }
    let most = S::largest(most);
    let mut sum = S::splat(0.0);
    for part in scores[..used].chunks_exact_mut(LANES) {
        let share = S::exp(S::add(S::load(part.as_ptr()), S::splat(-most)));
        S::store(part.as_mut_ptr(), share);
    }
    scores[count..used].fill(0.0); // e^-87, not 0
    for part in scores[..used].chunks_exact(LANES) {
        sum = S::add(S::load(part.as_ptr()), sum);
    }
    *out.add(n) = most;
    *out.add(n + 1) = S::sum(sum);
    let (shares, mut at) = (&scores[..count], 0);
    while at + LANES <= n {
        match (n - at) / LANES {
            8.. => {
                weigh::<S, 8>(shares, values, n, at, out);
                at += 8 * LANES;
            }
            4..=7 => {
                weigh::<S, 4>(shares, values, n, at, out);
                at += 4 * LANES;
            }
            _ => {
                weigh::<S, 1>(shares, values, n, at, out);
                at += LANES;
            }
        }
    }
    while at < n {
        let mut sum = 0.0;
        for (j, share) in shares.iter().enumerate() {
            sum += share * *values.add(j * n + at);
        }
        *out.add(at) = sum;
        at += 1;
    }
}

/// Merges the parts of one head's attention, `stride` numbers apart, into `out`.
#[inline(always)]
pub(crate) fn merge(parts: &[f32], stride: usize, out: &mut [f32]) {
    let n = out.len();
    let most = parts
        .chunks(stride)
        .fold(f32::NEG_INFINITY, |m, part| m.max(part[n]));
    let total: f32 = parts
        .chunks(stride)
        .map(|part| (part[n] - most).exp() * part[n + 1])
        .sum();
    out.fill(0.0);
    for part in parts.chunks(stride) {
        let share = (part[n] - most).exp() / total;
        for (o, x) in out.iter_mut().zip(part) {
            *o += share * x;
        }
    }
}

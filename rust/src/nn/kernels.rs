//! The arithmetic of a step, written once over [`Simd`].
//!
//! Sums of a row are made in one order, whatever other rows there are: a row's
//! bits do not depend on its batch-mates. Called by `step`, which has checked
//! every length; the slow twins are in the tests below.

use crate::nn::pack::{Matrix, Numbers, TILE};
use crate::nn::simd::{Simd, LANES};

/// Keys that one task of attention reads at most.
pub(crate) const CHUNK: usize = 128;

/// Keys of width `n` that one task reads: 32 KiB where that is possible, so that rows which share
/// them find them, and then their values, in the nearest cache.
pub(crate) fn chunk(n: usize) -> usize {
    (8192 / n).clamp(32, CHUNK) / LANES * LANES
}

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
            // a number that is none would be rounded to one: the row's scale says it instead
            let bad = row.iter().any(|x| x.is_nan());
            self.sizes
                .push(if bad { f32::NAN } else { largest / 127.0 });
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

/// Shares that one scaled query [n] gives to `count` (1 to [`CHUNK`]) keys [count, n]:
/// e^(score - most) in `scores`; `most` and the sum of the shares in `out[n]` and `out[n + 1]`.
///
/// # Safety
///
/// The processor has what S names; the pointers have that many numbers.
#[inline(always)]
pub(crate) unsafe fn share<S: Simd>(
    q: *const f32,
    keys: *const f32,
    n: usize,
    count: usize,
    scores: &mut [f32; CHUNK],
    out: *mut f32,
) {
    let used = count.next_multiple_of(LANES);
    scores[count..used].fill(f32::NEG_INFINITY);
    let mut j = 0;
    while j + 4 <= count {
        scores[j..j + 4].copy_from_slice(&dot4::<S>(q, keys.add(j * n), n));
        j += 4;
    }
    while j < count {
        scores[j] = dot::<S>(q, keys.add(j * n), n);
        j += 1;
    }
    let mut most = S::load(scores.as_ptr());
    for part in scores[..used].chunks_exact(LANES) {
        most = S::max(S::load(part.as_ptr()), most);
    }
    let most = S::largest(most);
    for part in scores[..used].chunks_exact_mut(LANES) {
        let share = S::exp(S::add(S::load(part.as_ptr()), S::splat(-most)));
        S::store(part.as_mut_ptr(), share);
    }
    scores[count..used].fill(0.0); // e^-87, not 0
    let mut sum = S::splat(0.0);
    for part in scores[..used].chunks_exact(LANES) {
        sum = S::add(S::load(part.as_ptr()), sum);
    }
    *out.add(n) = most;
    *out.add(n + 1) = S::sum(sum);
}

/// The values [shares, n] times their shares, in `out` [n].
///
/// # Safety
///
/// The processor has what S names; the pointers have that many numbers.
#[inline(always)]
pub(crate) unsafe fn spend<S: Simd>(shares: &[f32], values: *const f32, n: usize, out: *mut f32) {
    let mut at = 0;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::pack::Format;
    use crate::nn::simd::Plain;
    #[cfg(target_arch = "x86_64")]
    use crate::nn::simd::{Avx2, Avx512, Level};

    /// Numbers between -1 and 1, the same every time.
    fn random(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    fn close(got: f32, expected: f64, scale: f64) {
        let off = (f64::from(got) - expected).abs();
        assert!(off <= 2e-6 * (1.0 + scale), "{got} is not {expected}");
    }

    /// Runs a test with every vector that this processor has.
    macro_rules! with_each_level {
        ($check:ident) => {
            // SAFETY: the features are there; every pointer comes from a vector of that length.
            unsafe {
                $check::<Plain>();
                #[cfg(target_arch = "x86_64")]
                if Level::detect() != Level::Plain {
                    #[target_feature(enable = "avx2,fma")]
                    unsafe fn wide() {
                        $check::<Avx2>();
                    }
                    wide();
                }
                #[cfg(target_arch = "x86_64")]
                if Level::detect() == Level::Avx512 {
                    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
                    unsafe fn wider() {
                        $check::<Avx512>();
                    }
                    wider();
                }
            }
        };
    }

    #[inline(always)]
    unsafe fn check_products<S: Simd>() {
        for (outputs, width) in [(1, 1), (40, 7), (64, 33), (100, 130)] {
            let weights = random(outputs * width, 1);
            let rows: Vec<_> = weights.chunks(width).map(Some).collect();
            let x = random(4 * width, 2);
            for format in [Format::Float32, Format::BFloat16, Format::Int8] {
                let matrix = Matrix::pack(&rows, width, None, format);
                let mut inputs = Inputs::default();
                inputs.shape(4, matrix.width, width);
                for (to, from) in inputs.floats.chunks_mut(matrix.width).zip(x.chunks(width)) {
                    to[..width].copy_from_slice(from);
                }
                inputs.round();
                // as much as rounding to the format can do to the sum of so many products
                let slack = match format {
                    Format::Float32 => 0.0,
                    Format::BFloat16 => 1.0 / 512.0,
                    Format::Int8 => 1.0 / 100.0,
                };
                for count in 1..=4 {
                    let first = 4 - count;
                    for output in 0..outputs {
                        let mut out = [f32::NAN; 4 * TILE];
                        product::<S>(&matrix, output / TILE, &inputs, first, count, &mut out);
                        for r in 0..count {
                            let pairs = x[(first + r) * width..][..width]
                                .iter()
                                .zip(&weights[output * width..][..width]);
                            let exact: f64 =
                                pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                            let got = out[r * TILE + output % TILE];
                            let off = (f64::from(got) - exact).abs();
                            assert!(
                                off <= 1e-5 + slack * width as f64,
                                "{format:?} {got} {exact}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn products_are_sums_of_products() {
        with_each_level!(check_products);
    }

    #[inline(always)]
    unsafe fn check_bytes<S: Simd>() {
        // the extremes: 255 x -127 four times over, where sums of two in 16 bits would overflow
        let weights: Vec<i8> = (0..64).map(|i| [-127, 127, 5, -127][i % 4]).collect();
        let mut out = [0; LANES];
        S::store_ints(
            out.as_mut_ptr(),
            S::dot_bytes(S::no_bytes(), [255, 255, 3, 255], weights.as_ptr()),
        );
        assert_eq!(out, [15 - 255 * 127; LANES]);
    }

    #[test]
    fn sums_of_bytes_are_exact() {
        with_each_level!(check_bytes);
    }

    #[inline(always)]
    unsafe fn check_functions<S: Simd>() {
        let x: Vec<f32> = random(64, 3).iter().map(|x| x * 90.0).collect();
        let mut out = [0.0; LANES];
        for part in x.chunks(LANES) {
            S::store(out.as_mut_ptr(), S::exp(S::load(part.as_ptr())));
            for (x, y) in part.iter().zip(out) {
                let exact = f64::from(x.max(-87.0)).exp();
                if *x < 88.0 {
                    assert!(
                        (f64::from(y) - exact).abs() <= 3e-7 * exact,
                        "e^{x} is not {y}"
                    );
                }
            }
        }
        let parts = [&x[..16], &x[16..32], &x[32..48], &x[48..]];
        let sums = S::sum4(parts.map(|part| S::load(part.as_ptr())));
        for (part, sum) in parts.iter().zip(sums) {
            let exact: f64 = part.iter().map(|x| f64::from(*x)).sum();
            close(sum, exact, 900.0);
            close(S::sum(S::load(part.as_ptr())), exact, 900.0);
            let largest = part.iter().fold(f32::MIN, |m, x| m.max(*x));
            assert_eq!(S::largest(S::load(part.as_ptr())), largest);
        }
        for (gate, up) in [
            (1.5f32, 2.0f32),
            (-3.0, 1.0),
            (-200.0, 3.0),
            (200.0, -1.0),
            (0.0, 1.0),
        ] {
            let tile = [[gate; LANES], [up; LANES]].concat();
            swiglu::<S>(tile.as_ptr(), out.as_mut_ptr());
            let gate = f64::from(gate);
            close(
                out[3],
                gate / (1.0 + (-gate).exp()) * f64::from(up),
                gate.abs(),
            );
        }
        for n in [1, 16, 21, 64] {
            let (x, gain, mut out) = (random(n, 4), random(n, 5), vec![0.0; n]);
            norm::<S>(&x, Some(&gain), 1e-5, &mut out);
            let squares: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
            for i in 0..n {
                let exact = f64::from(x[i]) / (squares / n as f64 + 1e-5).sqrt();
                close(out[i], exact * f64::from(gain[i]), 1.0);
            }
        }
    }

    #[test]
    fn functions_equal_those_of_the_library() {
        with_each_level!(check_functions);
    }

    #[inline(always)]
    unsafe fn check_attention<S: Simd>() {
        for n in [2, 8, 18, 64, 80, 128, 240] {
            for total in [1, 3, 4, 17, CHUNK, CHUNK + 1, 3 * CHUNK + 70] {
                let q: Vec<f32> = random(n, 6).iter().map(|x| x * 3.0).collect();
                let (keys, values) = (random(total * n, 7), random(total * n, 8));
                let mut parts = Vec::new();
                let mut start = 0;
                while start < total {
                    let count = CHUNK.min(total - start);
                    let mut part = vec![f32::NAN; n + 2];
                    let (k, v) = (keys[start * n..].as_ptr(), values[start * n..].as_ptr());
                    let mut scores = [f32::NAN; CHUNK];
                    share::<S>(q.as_ptr(), k, n, count, &mut scores, part.as_mut_ptr());
                    spend::<S>(&scores[..count], v, n, part.as_mut_ptr());
                    parts.extend(part);
                    start += count;
                }
                let mut got = vec![0.0; n];
                merge(&parts, n + 2, &mut got);
                let score = |key: &[f32]| -> f64 {
                    key.iter()
                        .zip(&q)
                        .map(|(a, b)| f64::from(*a) * f64::from(*b))
                        .sum()
                };
                let shares: Vec<f64> = keys.chunks(n).map(|key| score(key).exp()).collect();
                let all: f64 = shares.iter().sum();
                for i in 0..n {
                    let lines = values.chunks(n).zip(&shares);
                    let exact: f64 = lines.map(|(v, s)| f64::from(v[i]) * s / all).sum();
                    close(got[i], exact, 2.0);
                }
            }
        }
    }

    #[test]
    fn attention_in_parts_equals_attention() {
        with_each_level!(check_attention);
    }

    #[test]
    fn a_rotation_turns_neighbours() {
        let mut head = [1.0, 0.0, 2.0, 3.0];
        rotate(&mut head, &[0.0, 0.6], &[1.0, 0.8], 2.0);
        let expected = [0.0, 2.0, 4.0 * 0.6 - 6.0 * 0.8, 6.0 * 0.6 + 4.0 * 0.8];
        for (got, expected) in head.iter().zip(expected) {
            close(*got, expected, 1.0);
        }
    }
}

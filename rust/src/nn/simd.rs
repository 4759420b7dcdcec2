//! Sixteen numbers at a time: AVX-512, AVX2 with FMA, or plain Rust.
//!
//! `kernels` is written once, over [`Simd`]. What it is compiled for is chosen
//! when the program runs; the plain form is the readable twin of the others
//! and what other processors run (compilers make NEON of it).

use std::fmt;

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// What the processor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// AVX-512 with VNNI: products of eight-bit numbers too.
    Avx512,
    /// AVX2 and FMA.
    Avx2,
    /// Nothing that is asked for by name.
    Plain,
}

impl Level {
    /// The best of this processor.
    pub fn detect() -> Level {
        #[cfg(target_arch = "x86_64")]
        {
            let wide = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni");
            if wide {
                return Level::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Level::Avx2;
            }
        }
        Level::Plain
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Level::Avx512 => "avx512",
            Level::Avx2 => "avx2",
            Level::Plain => "plain",
        })
    }
}

/// Vectors of [`LANES`] floats, and of as many sums of byte products.
///
/// # Safety
///
/// Every function wants a processor that has what the type names; those that
/// take a pointer want [`LANES`] numbers there ([`Simd::dot_bytes`]: 64 bytes).
/// All are inlined into functions that are compiled for that processor.
pub(crate) trait Simd: Copy {
    type V: Copy;
    type I: Copy;
    /// Rows whose sums of one tile the registers hold.
    const ROWS: usize;

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    /// bfloat16 numbers, widened.
    unsafe fn load_half(from: *const u16) -> Self::V;
    unsafe fn store(to: *mut f32, v: Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// a x b + c
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// e to each, from -87 (what is less is as -87) to 88.
    unsafe fn exp(v: Self::V) -> Self::V;
    unsafe fn sum(v: Self::V) -> f32;
    /// The four sums, in the order of the arguments.
    unsafe fn sum4(v: [Self::V; 4]) -> [f32; 4];
    unsafe fn largest(v: Self::V) -> f32;

    unsafe fn no_bytes() -> Self::I;
    /// To each of 16 sums the products of four unsigned `x` with its four signed weights.
    unsafe fn dot_bytes(sums: Self::I, x: [u8; 4], weights: *const i8) -> Self::I;
    unsafe fn add_ints(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn store_ints(to: *mut i32, v: Self::I);
}

/// Plain Rust over arrays.
#[derive(Clone, Copy)]
pub(crate) struct Plain;

/// a x b + c in one rounding where the processor has that, in two elsewhere: a call of the
/// library's exact function would cost a hundred times as much.
#[inline(always)]
fn fused(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
        a.mul_add(b, c)
    } else {
        a * b + c
    }
}

macro_rules! each {
    (|$i:ident| $value:expr) => {{
        let mut out = [0.0; LANES];
        for ($i, o) in out.iter_mut().enumerate() {
            *o = $value;
        }
        out
    }};
}

impl Simd for Plain {
    type V = [f32; LANES];
    type I = [i32; LANES];
    const ROWS: usize = 1;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        from.cast::<Self::V>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn load_half(from: *const u16) -> Self::V {
        let halves = from.cast::<[u16; LANES]>().read_unaligned();
        each!(|i| f32::from_bits(u32::from(halves[i]) << 16))
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: Self::V) {
        to.cast::<Self::V>().write_unaligned(v);
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        each!(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        each!(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        each!(|i| a[i] / b[i])
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        each!(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        each!(|i| fused(a[i], b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn exp(v: Self::V) -> Self::V {
        each!(|i| v[i].max(-87.0).exp())
    }
    #[inline(always)]
    unsafe fn sum(v: Self::V) -> f32 {
        v.iter().sum()
    }
    #[inline(always)]
    unsafe fn sum4(v: [Self::V; 4]) -> [f32; 4] {
        v.map(|one| one.iter().sum())
    }
    #[inline(always)]
    unsafe fn largest(v: Self::V) -> f32 {
        v.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn no_bytes() -> Self::I {
        [0; LANES]
    }
    #[inline(always)]
    unsafe fn dot_bytes(mut sums: Self::I, x: [u8; 4], weights: *const i8) -> Self::I {
        let weights = weights.cast::<[[i8; 4]; LANES]>().read_unaligned();
        for (sum, four) in sums.iter_mut().zip(weights) {
            for (x, w) in x.into_iter().zip(four) {
                *sum += i32::from(x) * i32::from(w);
            }
        }
        sums
    }
    #[inline(always)]
    unsafe fn add_ints(a: Self::I, b: Self::I) -> Self::I {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn store_ints(to: *mut i32, v: Self::I) {
        to.cast::<Self::I>().write_unaligned(v);
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Plain, Simd, LANES};
    use std::arch::x86_64::*;

    // e^x = 2^n e^r, n the nearest integer to x / ln 2, |r| <= ln 2 / 2; ln 2 in two parts, so that
    // r keeps its last bits; e^r by its series to r^7 / 7!, which is exact to float32 there.
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LN2_HIGH: f32 = 0.693_359_4; // few bits: n times it is exact
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const SERIES: [f32; 8] = [
        1.0 / 5040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ];

    /// One register of 16 floats.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512;

    impl Simd for Avx512 {
        type V = __m512;
        type I = __m512i;
        const ROWS: usize = 4;

        #[inline(always)]
        unsafe fn splat(x: f32) -> __m512 {
            _mm512_set1_ps(x)
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m512 {
            _mm512_loadu_ps(from)
        }
        #[inline(always)]
        unsafe fn load_half(from: *const u16) -> __m512 {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
        #[inline(always)]
        unsafe fn store(to: *mut f32, v: __m512) {
            _mm512_storeu_ps(to, v);
        }
        #[inline(always)]
        unsafe fn add(a: __m512, b: __m512) -> __m512 {
            _mm512_add_ps(a, b)
        }
        #[inline(always)]
        unsafe fn mul(a: __m512, b: __m512) -> __m512 {
            _mm512_mul_ps(a, b)
        }
        #[inline(always)]
        unsafe fn div(a: __m512, b: __m512) -> __m512 {
            _mm512_div_ps(a, b)
        }
        #[inline(always)]
        unsafe fn max(a: __m512, b: __m512) -> __m512 {
            _mm512_max_ps(a, b)
        }
        #[inline(always)]
        unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
            _mm512_fmadd_ps(a, b, c)
        }
        #[inline(always)]
        unsafe fn exp(v: __m512) -> __m512 {
            let v = _mm512_max_ps(v, _mm512_set1_ps(-87.0));
            let scaled = _mm512_mul_ps(v, _mm512_set1_ps(LOG2_E));
            let n = _mm512_roundscale_ps::<0>(scaled);
            let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(LN2_HIGH), v);
            let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(LN2_LOW), r);
            let mut y = _mm512_set1_ps(SERIES[0]);
            for term in &SERIES[1..] {
                y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(*term));
            }
            _mm512_scalef_ps(y, n)
        }
        #[inline(always)]
        unsafe fn sum(v: __m512) -> f32 {
            _mm512_reduce_add_ps(v)
        }
        #[inline(always)]
        unsafe fn sum4(v: [__m512; 4]) -> [f32; 4] {
            let [a, b, c, d] = v.map(|one| {
                _mm256_add_ps(
                    _mm512_castps512_ps256(one),
                    _mm512_extractf32x8_ps::<1>(one),
                )
            });
            sum4_halves(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d))
        }
        #[inline(always)]
        unsafe fn largest(v: __m512) -> f32 {
            _mm512_reduce_max_ps(v)
        }
        #[inline(always)]
        unsafe fn no_bytes() -> __m512i {
            _mm512_setzero_si512()
        }
        #[inline(always)]
        unsafe fn dot_bytes(sums: __m512i, x: [u8; 4], weights: *const i8) -> __m512i {
            let x = _mm512_set1_epi32(i32::from_le_bytes(x));
            _mm512_dpbusd_epi32(sums, x, _mm512_loadu_si512(weights.cast()))
        }
        #[inline(always)]
        unsafe fn add_ints(a: __m512i, b: __m512i) -> __m512i {
            _mm512_add_epi32(a, b)
        }
        #[inline(always)]
        unsafe fn store_ints(to: *mut i32, v: __m512i) {
            _mm512_storeu_si512(to.cast(), v);
        }
    }

    #[inline(always)]
    unsafe fn sum4_halves(ab: __m256, cd: __m256) -> [f32; 4] {
        let both = _mm256_hadd_ps(ab, cd);
        let four = _mm_add_ps(
            _mm256_castps256_ps128(both),
            _mm256_extractf128_ps::<1>(both),
        );
        let mut out = [0.0; 4];
        _mm_storeu_ps(out.as_mut_ptr(), four);
        out
    }

    /// Two registers of 8 floats.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2;

    #[inline(always)]
    unsafe fn exp8(v: __m256) -> __m256 {
        let v = _mm256_max_ps(v, _mm256_set1_ps(-87.0));
        let scaled = _mm256_mul_ps(v, _mm256_set1_ps(LOG2_E));
        let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(scaled);
        let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(LN2_HIGH), v);
        let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(LN2_LOW), r);
        let mut y = _mm256_set1_ps(SERIES[0]);
        for term in &SERIES[1..] {
            y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(*term));
        }
        let power = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        _mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(power)))
    }

    impl Simd for Avx2 {
        type V = [__m256; 2];
        type I = [i32; LANES];
        const ROWS: usize = 1;

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self::V {
            [_mm256_set1_ps(x); 2]
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self::V {
            [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))]
        }
        #[inline(always)]
        unsafe fn load_half(from: *const u16) -> Self::V {
            [from, from.add(8)].map(|at| {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            })
        }
        #[inline(always)]
        unsafe fn store(to: *mut f32, v: Self::V) {
            _mm256_storeu_ps(to, v[0]);
            _mm256_storeu_ps(to.add(8), v[1]);
        }
        #[inline(always)]
        unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
            [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])]
        }
        #[inline(always)]
        unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
            [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])]
        }
        #[inline(always)]
        unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
            [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])]
        }
        #[inline(always)]
        unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
            [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])]
        }
        #[inline(always)]
        unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            [
                _mm256_fmadd_ps(a[0], b[0], c[0]),
                _mm256_fmadd_ps(a[1], b[1], c[1]),
            ]
        }
        #[inline(always)]
        unsafe fn exp(v: Self::V) -> Self::V {
            [exp8(v[0]), exp8(v[1])]
        }
        #[inline(always)]
        unsafe fn sum(v: Self::V) -> f32 {
            let [sum, ..] = Self::sum4([v; 4]);
            sum
        }
        #[inline(always)]
        unsafe fn sum4(v: [Self::V; 4]) -> [f32; 4] {
            let [a, b, c, d] = v.map(|[low, high]| _mm256_add_ps(low, high));
            sum4_halves(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d))
        }
        #[inline(always)]
        unsafe fn largest(v: Self::V) -> f32 {
            let mut all = [0.0; LANES];
            Self::store(all.as_mut_ptr(), v);
            Plain::largest(all)
        }
        #[inline(always)]
        unsafe fn no_bytes() -> Self::I {
            Plain::no_bytes()
        }
        #[inline(always)]
        unsafe fn dot_bytes(sums: Self::I, x: [u8; 4], weights: *const i8) -> Self::I {
            Plain::dot_bytes(sums, x, weights)
        }
        #[inline(always)]
        unsafe fn add_ints(a: Self::I, b: Self::I) -> Self::I {
            Plain::add_ints(a, b)
        }
        #[inline(always)]
        unsafe fn store_ints(to: *mut i32, v: Self::I) {
            Plain::store_ints(to, v);
        }
    }
}

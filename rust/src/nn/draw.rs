//! Draws tokens from logits, a row at a time.
//!
//! The rules are those of Python's `fledge.engine.sampling`, which is the
//! readable twin: greedy, or one uniform number put through the inverse of the
//! cumulative distribution, of all tokens or of the best `top_k` (of those by
//! `top_p` and `min_p`). A vocabulary fits into the cache, so a draw costs
//! microseconds where a chain of operators costs a tenth of a millisecond.

#[cfg(target_arch = "x86_64")]
use crate::nn::simd::{Avx2, Avx512};
use crate::nn::simd::{Level, Plain, Simd, LANES};

/// Logits that are looked at as one.
const BLOCK: usize = 64;

/// How one row is drawn.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// 0: the best token.
    pub temperature: f32,
    /// 0: all tokens.
    pub top_k: usize,
    /// The smallest set whose mass reaches this; 1: all. Only with `top_k`.
    pub top_p: f32,
    /// What has less than this share of the best is dropped; 0: nothing. Only with `top_k`.
    pub min_p: f32,
}

/// The token that `uniform` (0 to 1) picks of one row's logits, which are not empty.
///
/// Of equal logits the smaller id counts as the better.
pub fn draw(logits: &[f32], rule: Rule, uniform: f64) -> usize {
    let blocks = maxima(logits);
    let most = largest(&blocks);
    if rule.temperature == 0.0 {
        let block = blocks.iter().position(|m| *m >= most).unwrap_or(0);
        let part = logits.iter().enumerate().skip(block * BLOCK).take(BLOCK);
        return part
            .filter(|(_, x)| **x >= most)
            .map(|(i, _)| i)
            .next()
            .unwrap_or(0); // all NaN
    }
    if rule.top_k > 0 && rule.top_k < logits.len() {
        return draw_best(logits, &blocks, rule, uniform);
    }
    draw_all(logits, most, rule.temperature, uniform)
}

/// Log-probability of a token of one row.
pub fn logprob(logits: &[f32], token: usize) -> f64 {
    if logits.iter().any(|x| x.is_nan()) {
        return f64::NAN; // as softmax has it; `max` would pass over it
    }
    let most = largest(&maxima(logits));
    let total: f64 = shares(logits, most, 1.0).1.iter().sum();
    f64::from(logits[token]) - f64::from(most) - total.ln()
}

fn largest(numbers: &[f32]) -> f32 {
    numbers.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x))
}

fn draw_best(logits: &[f32], blocks: &[f32], rule: Rule, uniform: f64) -> usize {
    let better = |a: &(f32, usize), b: &(f32, usize)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
    // the k best lie in the k blocks with the largest maxima, and none is below the least of those
    let mut order = blocks.to_vec();
    let floor = if rule.top_k < order.len() {
        *order
            .select_nth_unstable_by(rule.top_k - 1, |a, b| b.total_cmp(a))
            .1
    } else {
        f32::NEG_INFINITY
    };
    let mut best = Vec::with_capacity(4 * rule.top_k);
    for (part, index) in logits
        .chunks(BLOCK)
        .zip(0..)
        .filter(|(_, i)| blocks[*i] >= floor)
    {
        let at = index * BLOCK;
        best.extend(
            part.iter()
                .zip(at..)
                .filter(|(x, _)| **x >= floor)
                .map(|(x, i)| (*x, i)),
        );
    }
    if best.is_empty() {
        return 0; // all NaN
    }
    if rule.top_k < best.len() {
        best.select_nth_unstable_by(rule.top_k - 1, better);
        best.truncate(rule.top_k);
    }
    best.sort_unstable_by(better);
    let scaled = best.iter().map(|(x, _)| x / rule.temperature);
    let most = best[0].0 / rule.temperature;
    let mut shares: Vec<f32> = scaled.map(|x| (x - most).exp()).collect();
    let total: f32 = shares.iter().sum();
    shares.iter_mut().for_each(|share| *share /= total);
    truncate(&mut shares, rule);
    best[pick(&shares, uniform).0].1
}

/// top_p, then min_p, on shares from the best down.
fn truncate(shares: &mut [f32], rule: Rule) {
    if rule.top_p < 1.0 {
        let mut before = 0.0;
        for (i, share) in shares.iter_mut().enumerate() {
            let own = *share;
            if before >= rule.top_p && i > 0 {
                *share = 0.0;
            }
            before += own;
        }
    }
    let floor = rule.min_p * shares[0];
    shares
        .iter_mut()
        .filter(|share| **share < floor)
        .for_each(|share| *share = 0.0);
}

fn draw_all(logits: &[f32], most: f32, temperature: f32, uniform: f64) -> usize {
    let (shares, sums) = shares(logits, most, temperature);
    let (block, rest) = pick(&sums, uniform);
    let at = block * BLOCK;
    let inside = &shares[at..logits.len().min(at + BLOCK)];
    let whole: f64 = inside.iter().map(|x| f64::from(*x)).sum();
    // as a share of the block, so that rounding cannot lead out of it
    at + pick(inside, rest / whole).0
}

/// Where the cumulative sum of `shares` passes uniform x total, and how far in that share.
fn pick<T: Copy + Into<f64>>(shares: &[T], uniform: f64) -> (usize, f64) {
    let total: f64 = shares.iter().map(|x| (*x).into()).sum();
    // rounding must not reach the total: behind it stand only shares of 0
    let below = 1.0 - f64::EPSILON;
    let sought = uniform.min(below) * (total * below);
    let mut sum = 0.0;
    for (i, share) in shares.iter().enumerate() {
        let next = sum + (*share).into();
        if next > sought {
            return (i, sought - sum);
        }
        sum = next;
    }
    (0, 0.0) // NaN: anything is as good
}

/// Of each block the largest logit; NaN is passed over.
fn maxima(logits: &[f32]) -> Vec<f32> {
    let mut out = Vec::with_capacity(logits.len().div_ceil(BLOCK));
    match Level::detect() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the features were found.
        Level::Avx512 => unsafe { maxima_avx512(logits, &mut out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx2 => unsafe { maxima_avx2(logits, &mut out) },
        // SAFETY: plain Rust asks for nothing.
        _ => unsafe { maxima_with::<Plain>(logits, &mut out) },
    }
    out
}

/// e^((x - most) / temperature) of each logit, and the sums of blocks.
fn shares(logits: &[f32], most: f32, temperature: f32) -> (Vec<f32>, Vec<f64>) {
    let mut out = Vec::with_capacity(logits.len());
    let mut sums = Vec::with_capacity(logits.len().div_ceil(BLOCK));
    match Level::detect() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the features were found.
        Level::Avx512 => unsafe { shares_avx512(logits, most, temperature, &mut out, &mut sums) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx2 => unsafe { shares_avx2(logits, most, temperature, &mut out, &mut sums) },
        // SAFETY: plain Rust asks for nothing.
        _ => unsafe { shares_with::<Plain>(logits, most, temperature, &mut out, &mut sums) },
    }
    (out, sums)
}

/// # Safety
///
/// The processor has what S names.
#[inline(always)]
unsafe fn maxima_with<S: Simd>(logits: &[f32], out: &mut Vec<f32>) {
    for block in logits.chunks(BLOCK) {
        if block.len() < BLOCK {
            out.push(largest(block));
            continue;
        }
        let mut most = S::splat(f32::NEG_INFINITY);
        for part in block.chunks_exact(LANES) {
            most = S::max(S::load(part.as_ptr()), most); // the second where the first is NaN
        }
        out.push(S::largest(most));
    }
}

/// # Safety
///
/// The processor has what S names.
#[inline(always)]
unsafe fn shares_with<S: Simd>(
    logits: &[f32],
    most: f32,
    temperature: f32,
    out: &mut Vec<f32>,
    sums: &mut Vec<f64>,
) {
    for block in logits.chunks(BLOCK) {
        let mut lines = [f32::NEG_INFINITY; BLOCK];
        for (line, x) in lines.iter_mut().zip(block) {
            *line = (x - most) / temperature;
        }
        let mut shares = [0.0; BLOCK];
        for (line, share) in lines
            .chunks_exact(LANES)
            .zip(shares.chunks_exact_mut(LANES))
        {
            S::store(share.as_mut_ptr(), S::exp(S::load(line.as_ptr())));
        }
        let mut sum = S::splat(0.0);
        for (line, share) in lines.iter().zip(&mut shares) {
            *share = if *line < -87.0 { 0.0 } else { *share }; // what is masked is never drawn
        }
        for share in shares.chunks_exact(LANES) {
            sum = S::add(S::load(share.as_ptr()), sum);
        }
        sums.push(f64::from(S::sum(sum)));
        out.extend_from_slice(&shares[..block.len()]);
    }
}

macro_rules! for_processor {
    ($features:literal, $vector:ty, $maxima:ident, $shares:ident) => {
        /// # Safety
        ///
        /// The processor has the features.
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = $features)]
        unsafe fn $maxima(logits: &[f32], out: &mut Vec<f32>) {
            maxima_with::<$vector>(logits, out);
        }

        /// # Safety
        ///
        /// The processor has the features.
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = $features)]
        unsafe fn $shares(
            logits: &[f32],
            most: f32,
            temperature: f32,
            out: &mut Vec<f32>,
            sums: &mut Vec<f64>,
        ) {
            shares_with::<$vector>(logits, most, temperature, out, sums);
        }
    };
}

for_processor!(
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni",
    Avx512,
    maxima_avx512,
    shares_avx512
);
for_processor!("avx2,fma", Avx2, maxima_avx2, shares_avx2);

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Rule = Rule {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
    };

    fn logits(count: usize) -> Vec<f32> {
        (0..count)
            .map(|i| ((i * i * 7919 % 10_007) as f32).sin() * 4.0)
            .collect()
    }

    /// The order and the shares by a plain sort in double precision.
    fn expected(logits: &[f32], rule: Rule, uniform: f64) -> (usize, bool) {
        let mut ids: Vec<usize> = (0..logits.len()).collect();
        let ranked = rule.top_k > 0 && rule.top_k < logits.len();
        if ranked {
            ids.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
            ids.truncate(rule.top_k);
        }
        let share = |i: &usize| (f64::from(logits[*i]) / f64::from(rule.temperature)).exp();
        let mut shares: Vec<f64> = ids.iter().map(share).collect();
        let total: f64 = shares.iter().sum();
        shares.iter_mut().for_each(|x| *x /= total);
        if ranked {
            let (mut before, best) = (0.0, shares[0]);
            for share in &mut shares {
                let own = *share;
                if before >= f64::from(rule.top_p) || own < f64::from(rule.min_p) * best {
                    *share = 0.0;
                }
                before += own;
            }
        }
        let total: f64 = shares.iter().sum();
        let mut sum = 0.0;
        for (id, share) in ids.iter().zip(&shares) {
            let next = sum + share / total;
            if next > uniform {
                let clear = uniform - sum > 1e-6 && next - uniform > 1e-6;
                return (*id, clear || sum == 0.0 && next - uniform > 1e-6);
            }
            sum = next;
        }
        unreachable!()
    }

    #[test]
    fn draws_equal_those_of_a_plain_sort() {
        let mut compared = 0;
        for count in [1, 5, 64, 100, 4096, 5000] {
            let logits = logits(count);
            for temperature in [0.3, 1.0, 2.0] {
                for (top_k, top_p, min_p) in [
                    (0, 1.0, 0.0),
                    (1, 1.0, 0.0),
                    (3, 1.0, 0.0),
                    (50, 0.8, 0.0),
                    (70, 1.0, 0.3),
                ] {
                    let rule = Rule {
                        temperature,
                        top_k,
                        top_p,
                        min_p,
                    };
                    for i in 0..100 {
                        let uniform = f64::from(i) / 100.0;
                        let (token, clear) = expected(&logits, rule, uniform);
                        if clear {
                            assert_eq!(draw(&logits, rule, uniform), token, "{rule:?} {uniform}");
                            compared += 1;
                        }
                    }
                }
            }
        }
        assert!(compared > 8500, "{compared}");
    }

    #[test]
    fn the_greedy_choice_is_the_first_of_the_best() {
        let rule = Rule {
            temperature: 0.0,
            ..PLAIN
        };
        for count in [1, 63, 64, 200, 1000] {
            let mut logits = logits(count);
            for at in [0, count / 2, count - 1] {
                logits[at] = 9.0;
                assert_eq!(draw(&logits, rule, 0.5), 0);
            }
            logits[0] = 1.0;
            assert_eq!(
                draw(&logits, rule, 0.5),
                if count == 1 { 0 } else { count / 2 }
            );
        }
    }

    #[test]
    fn what_is_masked_is_never_drawn() {
        let mut logits = vec![f32::NEG_INFINITY; 300];
        logits[211] = -5.0;
        for uniform in [0.0, 0.5, 1.0 - f64::EPSILON / 2.0, 1.0] {
            for top_k in [0, 1, 7] {
                assert_eq!(draw(&logits, Rule { top_k, ..PLAIN }, uniform), 211);
            }
        }
        for rule in [
            PLAIN,
            Rule { top_k: 4, ..PLAIN },
            Rule {
                temperature: 0.0,
                ..PLAIN
            },
        ] {
            assert!(draw(&[f32::NAN; 100], rule, 0.3) < 100);
            assert!(draw(&[f32::NEG_INFINITY; 100], rule, 0.3) < 100);
        }
    }

    #[test]
    fn log_probabilities_sum_to_one() {
        let logits = logits(1000);
        let total: f64 = (0..1000).map(|i| logprob(&logits, i).exp()).sum();
        assert!((total - 1.0).abs() < 1e-6);
    }
}

//! A model's weights in the order in which a step reads them.
//!
//! A matrix is cut into tiles of 32 outputs. A tile holds, input after input,
//! the weights of its 32 outputs side by side, so that a product reads memory
//! from front to back and needs no sums across a register. In eight bits four
//! inputs stand together, as the processor's instruction multiplies them. The
//! gain of a norm is multiplied into the matrix behind it.

use crate::error::{Error, ErrorKind};
use crate::nn::simd::LANES;

/// Outputs of a tile.
pub(crate) const TILE: usize = 2 * LANES;
const LARGE_PAGE: usize = 1 << 21;

/// How weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// As they are.
    Float32,
    /// The upper half of each, rounded; inputs stay float32.
    BFloat16,
    /// 8 bits and a scale for each output; inputs are rounded to 8 bits too.
    Int8,
}

impl std::str::FromStr for Format {
    type Err = Error;

    fn from_str(name: &str) -> Result<Format, Error> {
        match name {
            "float32" => Ok(Format::Float32),
            "bfloat16" => Ok(Format::BFloat16),
            "int8" => Ok(Format::Int8),
            _ => Err(Error::new(
                ErrorKind::InvalidStep,
                format!("no weights are called {name:?}"),
            )),
        }
    }
}

/// The sizes of a qwen3 model.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// Width of the stream.
    pub hidden_size: usize,
    /// Blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width inside the feed-forward layer.
    pub inner: usize,
    /// Positions that can be rotated to.
    pub positions: usize,
    /// What RMSNorm adds to the mean square.
    pub eps: f32,
}

impl Shape {
    /// Width of what attention gives.
    pub(crate) fn attended(&self) -> usize {
        self.heads * self.head_dim
    }

    fn check(&self) -> Result<(), Error> {
        let sizes = [
            self.vocab_size,
            self.hidden_size,
            self.layers,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.inner,
            self.positions,
        ];
        // far above any model, and no product of three of them overflows
        if sizes.iter().any(|&n| n == 0 || n > 1 << 20) {
            return Err(invalid("a size of the model is 0 or above 2^20"));
        }
        if !self.head_dim.is_multiple_of(2) || !self.heads.is_multiple_of(self.kv_heads) {
            return Err(invalid(
                "heads must be even in width and a multiple of the key heads",
            ));
        }
        if !self.eps.is_finite() || self.eps <= 0.0 {
            return Err(invalid("eps must be above 0"));
        }
        Ok(())
    }
}

pub(crate) fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidStep, message)
}

/// The weights of one block as a checkpoint has them: [out, in], row by row.
#[allow(missing_docs)] // the names are those of the checkpoint
pub struct LayerWeights<'a> {
    pub input_norm: &'a [f32],
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
    pub o: &'a [f32],
    pub q_norm: &'a [f32],
    pub k_norm: &'a [f32],
    pub post_norm: &'a [f32],
    pub gate: &'a [f32],
    pub up: &'a [f32],
    pub down: &'a [f32],
}

/// All weights but the embedding, which a step reads where it is.
pub struct Weights<'a> {
    /// The blocks in order.
    pub layers: Vec<LayerWeights<'a>>,
    /// Gain of the last norm.
    pub norm: &'a [f32],
    /// Logits of a state.
    pub head: &'a [f32],
    /// [positions, head_dim / 2]
    pub cos: &'a [f32],
    /// [positions, head_dim / 2]
    pub sin: &'a [f32],
}

/// Numbers in memory of their own, at the start of a large page where there is one.
pub(crate) struct Memory<T> {
    words: Vec<T>,
    start: usize,
}

impl<T: Copy + Default> Memory<T> {
    fn new(count: usize) -> Memory<T> {
        let size = size_of::<T>();
        let spare = if count * size >= LARGE_PAGE {
            LARGE_PAGE
        } else {
            64
        };
        let mut words = Vec::with_capacity(count + spare / size);
        crate::pages::ask_for_large_pages(&mut words);
        let address = words.as_ptr() as usize;
        let start = (address.next_multiple_of(spare) - address) / size;
        words.resize(count + spare / size, T::default());
        Memory { words, start }
    }

    pub(crate) fn as_ptr(&self) -> *const T {
        self.words[self.start..].as_ptr()
    }

    fn numbers(&mut self) -> &mut [T] {
        &mut self.words[self.start..]
    }
}

/// Weights of tiles, in one of the formats.
pub(crate) enum Numbers {
    Float32(Memory<f32>),
    BFloat16(Memory<u16>),
    /// Of each output the scale, and 128 times the sum of its weights: inputs are stored with
    /// 128 added, because the instruction wants them unsigned.
    Int8 {
        weights: Memory<i8>,
        scales: Vec<f32>,
        shifts: Vec<i32>,
    },
}

/// One packed matrix.
pub(crate) struct Matrix {
    pub numbers: Numbers,
    pub tiles: usize,
    /// Inputs, with zero weights added up to a multiple of [`LANES`].
    pub width: usize,
}

/// bfloat16, rounded to the nearest, ties to even.
fn half(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        return (bits >> 16) as u16 | 64;
    }
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

impl Matrix {
    /// Packs outputs (`None`: one of zeros), `gain` multiplied into their inputs.
    pub(crate) fn pack(
        outputs: &[Option<&[f32]>],
        inputs: usize,
        gain: Option<&[f32]>,
        format: Format,
    ) -> Matrix {
        let (tiles, width) = (outputs.len().div_ceil(TILE), inputs.next_multiple_of(LANES));
        let count = tiles * TILE * width;
        let mut lines = vec![0.0; TILE * width];
        let mut numbers = match format {
            Format::Float32 => Numbers::Float32(Memory::new(count)),
            Format::BFloat16 => Numbers::BFloat16(Memory::new(count)),
            Format::Int8 => Numbers::Int8 {
                weights: Memory::new(count),
                scales: vec![0.0; tiles * TILE],
                shifts: vec![0; tiles * TILE],
            },
        };
        for (tile, rows) in outputs.chunks(TILE).enumerate() {
            lines.fill(0.0);
            for (line, row) in lines.chunks_exact_mut(width).zip(rows) {
                line.iter_mut()
                    .zip(row.unwrap_or_default())
                    .for_each(|(w, x)| *w = *x);
                let gains = line.iter_mut().zip(gain.unwrap_or_default());
                gains.for_each(|(w, g)| *w *= g);
            }
            let place = tile * TILE * width..(tile + 1) * TILE * width;
            match &mut numbers {
                Numbers::Float32(memory) => {
                    side_by_side_outputs(&lines, &mut memory.numbers()[place], |x| x);
                }
                Numbers::BFloat16(memory) => {
                    side_by_side_outputs(&lines, &mut memory.numbers()[place], half);
                }
                Numbers::Int8 {
                    weights,
                    scales,
                    shifts,
                } => {
                    let to = &mut weights.numbers()[place];
                    for (i, line) in lines.chunks_exact(width).enumerate().take(rows.len()) {
                        let output = tile * TILE + i;
                        (scales[output], shifts[output]) = round_output(line, i, to);
                    }
                }
            }
        }
        Matrix {
            numbers,
            tiles,
            width,
        }
    }
}

/// Lines [TILE, width] turned: of each input the weights of all outputs.
fn side_by_side_outputs<T>(lines: &[f32], to: &mut [T], stored: impl Fn(f32) -> T) {
    let width = lines.len() / TILE;
    for (k, to) in to.chunks_exact_mut(TILE).enumerate() {
        for (i, to) in to.iter_mut().enumerate() {
            *to = stored(lines[i * width + k]);
        }
    }
}

/// One output in 8 bits, the `i`-th of a tile; its scale, and 128 times the sum of its weights.
fn round_output(line: &[f32], i: usize, tile: &mut [i8]) -> (f32, i32) {
    let largest = line.iter().fold(0.0f32, |m, w| m.max(w.abs()));
    // a weight that is no number makes its output none
    let scale = if line.iter().any(|w| w.is_nan()) {
        f32::NAN
    } else {
        (largest / 127.0).max(1e-12)
    };
    let mut sum = 0;
    for (k, w) in line.iter().enumerate() {
        let rounded = (w / scale).round_ties_even().clamp(-127.0, 127.0) as i8;
        tile[(k / 4 * TILE + i) * 4 + k % 4] = rounded;
        sum += i32::from(rounded);
    }
    (scale, 128 * sum)
}

pub(crate) struct Layer {
    pub qkv: Matrix,
    pub out: Matrix,
    /// 16 rows of the gate, then the same 16 of the other half, in each tile.
    pub gated: Matrix,
    pub down: Matrix,
    pub q_norm: Vec<f32>,
    pub k_norm: Vec<f32>,
}

/// A packed model.
pub(crate) struct Model {
    pub shape: Shape,
    pub layers: Vec<Layer>,
    pub norm: Vec<f32>,
    pub head: Matrix,
    pub cos: Vec<f32>,
    pub sin: Vec<f32>,
}

impl Model {
    pub(crate) fn pack(s: Shape, weights: &Weights, format: Format) -> Result<Model, Error> {
        s.check()?;
        // 127 x 127 x inputs is summed in 32 bits
        let inputs = [s.hidden_size, s.attended(), s.inner];
        if format == Format::Int8 && inputs.iter().any(|&n| n > 1 << 16) {
            return Err(invalid("8 bits serve up to 65,536 inputs of a matrix"));
        }
        check_lengths(&s, weights)?;
        let layers = weights
            .layers
            .iter()
            .map(|w| pack_layer(&s, w, format))
            .collect();
        Ok(Model {
            shape: s,
            layers,
            norm: weights.norm.to_vec(),
            head: Matrix::pack(
                &rows(weights.head, s.hidden_size),
                s.hidden_size,
                None,
                format,
            ),
            cos: weights.cos.to_vec(),
            sin: weights.sin.to_vec(),
        })
    }
}

fn rows(matrix: &[f32], width: usize) -> Vec<Option<&[f32]>> {
    matrix.chunks_exact(width).map(Some).collect()
}

/// Heads of `width` in the order 0, width / 2, 1, ...: the two of a rotation stand side by side, in
/// the cache too, as Python's `engine.packed` has them.
fn side_by_side<T: Copy>(numbers: &[T], width: usize) -> Vec<T> {
    let halves = numbers
        .chunks_exact(width)
        .map(|head| head.split_at(width / 2));
    halves
        .flat_map(|(low, high)| low.iter().zip(high).flat_map(|(a, b)| [*a, *b]))
        .collect()
}

fn pack_layer(s: &Shape, w: &LayerWeights, format: Format) -> Layer {
    let d = s.hidden_size;
    let pairs = |matrix| side_by_side(&rows(matrix, d), s.head_dim);
    let qkv = [pairs(w.q), pairs(w.k), rows(w.v, d)].concat();
    let (gate, up) = (rows(w.gate, d), rows(w.up, d));
    let mut gated = Vec::new();
    for (gate, up) in gate.chunks(LANES).zip(up.chunks(LANES)) {
        for half in [gate, up] {
            gated.extend(half);
            gated.resize(gated.len().next_multiple_of(LANES), None);
        }
    }
    Layer {
        qkv: Matrix::pack(&qkv, d, Some(w.input_norm), format),
        out: Matrix::pack(&rows(w.o, s.attended()), s.attended(), None, format),
        gated: Matrix::pack(&gated, d, Some(w.post_norm), format),
        down: Matrix::pack(&rows(w.down, s.inner), s.inner, None, format),
        q_norm: side_by_side(w.q_norm, s.head_dim),
        k_norm: side_by_side(w.k_norm, s.head_dim),
    }
}

fn check_lengths(s: &Shape, weights: &Weights) -> Result<(), Error> {
    let d = s.hidden_size;
    let (queries, keys) = (s.attended() * d, s.kv_heads * s.head_dim * d);
    let mut lengths = vec![
        ("norm", weights.norm, d),
        ("head", weights.head, s.vocab_size * d),
        ("cos", weights.cos, s.positions * s.head_dim / 2),
        ("sin", weights.sin, s.positions * s.head_dim / 2),
    ];
    if weights.layers.len() != s.layers {
        return Err(invalid(format!(
            "{} layers, not {}",
            weights.layers.len(),
            s.layers
        )));
    }
    for w in &weights.layers {
        lengths.extend([
            ("input_norm", w.input_norm, d),
            ("q", w.q, queries),
            ("k", w.k, keys),
            ("v", w.v, keys),
            ("o", w.o, queries),
            ("q_norm", w.q_norm, s.head_dim),
            ("k_norm", w.k_norm, s.head_dim),
            ("post_norm", w.post_norm, d),
            ("gate", w.gate, s.inner * d),
            ("up", w.up, s.inner * d),
            ("down", w.down, s.inner * d),
        ]);
    }
    for (name, numbers, wanted) in lengths {
        if numbers.len() != wanted {
            let got = numbers.len();
            return Err(invalid(format!(
                "{name} has {got} numbers; this shape has {wanted}"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_rounded_to_the_nearest() {
        let wide = |x| f32::from_bits(u32::from(half(x)) << 16);
        for (x, expected) in [
            (1.0, 1.0),
            (1.005, 1.007_812_5),
            (1.003, 1.0),
            (-1.005, -1.007_812_5),
        ] {
            assert_eq!(wide(x), expected);
        }
        assert_eq!(wide(1.003_906_3), 1.0); // ties go to the even one
        assert_eq!(wide(1.011_718_8), 1.015_625);
        assert!((wide(-3e38) + 3e38).abs() < 3e38 / 256.0);
        assert!(f32::from_bits(u32::from(half(f32::NAN)) << 16).is_nan());
    }

    #[test]
    fn a_tile_holds_an_input_of_all_outputs_side_by_side() {
        let weights: Vec<f32> = (0..40 * 3).map(|i| i as f32).collect();
        let matrix = Matrix::pack(
            &rows(&weights, 3),
            3,
            Some(&[1.0, 2.0, 3.0]),
            Format::Float32,
        );
        assert_eq!((matrix.tiles, matrix.width), (2, 16));
        let Numbers::Float32(memory) = &matrix.numbers else {
            panic!()
        };
        let numbers = &memory.words[memory.start..];
        assert_eq!(numbers[0..2], [0.0, 3.0]);
        assert_eq!(numbers[TILE + 5], 2.0 * 16.0);
        assert_eq!(numbers[TILE * 16 + 2 * TILE + 7], 3.0 * (39.0 * 3.0 + 2.0));
        assert_eq!(numbers[TILE * 16 + 8], 0.0);
    }

    #[test]
    fn memory_begins_where_a_large_page_does() {
        for count in [10, (1 << 19) + 5] {
            let memory: Memory<f32> = Memory::new(count);
            assert_eq!(
                memory.as_ptr() as usize % if count > 100 { LARGE_PAGE } else { 64 },
                0
            );
            assert!(memory.words.len() - memory.start >= count);
        }
    }
}

//! `fledge._bpe.DecodeStep`: `nn` for Python, the GIL released while it works.
//!
//! Arrays come in by the buffer protocol, which says their type, shape and
//! order and keeps them alive; no address is taken from Python.

use std::sync::{Mutex, PoisonError};

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::nn::{draw, logprob, Rule};
use crate::nn::{Cache, Format, LayerWeights, Level, Part, Row, Shape, Stepper, Weights};

/// One array of float32, contiguous.
struct Floats(PyBuffer<f32>);

impl Floats {
    fn new(buffer: PyBuffer<f32>) -> PyResult<Floats> {
        if buffer.is_c_contiguous() {
            Ok(Floats(buffer))
        } else {
            Err(PyValueError::new_err("an array is not contiguous"))
        }
    }

    fn numbers(&self) -> &[f32] {
        let start = self.0.buf_ptr().cast::<f32>();
        if self.0.item_count() == 0 || !start.is_aligned() {
            return &[];
        }
        // SAFETY: contiguous and aligned, kept alive by the buffer. Python promises (in the class's
        // docstring) that nobody writes while a call runs.
        unsafe { std::slice::from_raw_parts(start, self.0.item_count()) }
    }

    /// Where it may be written.
    fn writable(&self) -> PyResult<*mut f32> {
        let start = self.0.buf_ptr().cast::<f32>();
        if self.0.readonly() || !start.is_aligned() {
            return Err(PyValueError::new_err("an array can't be written to"));
        }
        Ok(start)
    }
}

/// Caches are held by their buffers.
struct Held {
    cache: Cache,
    _buffers: Vec<Floats>,
}

/// A packed qwen3 model and the threads that run its decode steps.
#[pyclass(module = "fledge._bpe", frozen)]
pub(crate) struct DecodeStep {
    stepper: Mutex<Stepper>,
    shape: Shape,
    embedding: Floats,
    cache: Mutex<Option<Held>>,
}

#[pymethods]
impl DecodeStep {
    #[new]
    #[pyo3(signature = (*, sizes, eps, weights, threads, embedding, norm, head, cos, sin, layers))]
    #[allow(clippy::too_many_arguments)] // keywords
    fn new(
        py: Python<'_>,
        sizes: [usize; 8],
        eps: f32,
        weights: &str,
        threads: usize,
        embedding: PyBuffer<f32>,
        norm: PyBuffer<f32>,
        head: PyBuffer<f32>,
        cos: PyBuffer<f32>,
        sin: PyBuffer<f32>,
        layers: Vec<[PyBuffer<f32>; 11]>,
    ) -> PyResult<DecodeStep> {
        let format: Format = weights.parse()?;
        let [vocab_size, hidden_size, count, heads, kv_heads, head_dim, inner, positions] = sizes;
        let shape = Shape {
            vocab_size,
            hidden_size,
            layers: count,
            heads,
            kv_heads,
            head_dim,
            inner,
            positions,
            eps,
        };
        let [embedding, norm, head] = [embedding, norm, head].map(Floats::new);
        let [cos, sin] = [cos, sin].map(Floats::new);
        let (embedding, norm, head, cos, sin) = (embedding?, norm?, head?, cos?, sin?);
        let mut arrays = Vec::new();
        for layer in layers {
            arrays.push(
                layer
                    .into_iter()
                    .map(Floats::new)
                    .collect::<PyResult<Vec<_>>>()?,
            );
        }
        let stepper = py.detach(|| {
            let layers = arrays.iter().map(|layer| {
                let a = |i: usize| layer[i].numbers();
                LayerWeights {
                    input_norm: a(0),
                    q: a(1),
                    k: a(2),
                    v: a(3),
                    o: a(4),
                    q_norm: a(5),
                    k_norm: a(6),
                    post_norm: a(7),
                    gate: a(8),
                    up: a(9),
                    down: a(10),
                }
            });
            let weights = Weights {
                layers: layers.collect(),
                norm: norm.numbers(),
                head: head.numbers(),
                cos: cos.numbers(),
                sin: sin.numbers(),
            };
            Stepper::new(shape, &weights, format, threads)
        })?;
        if embedding.numbers().len() != vocab_size * hidden_size {
            return Err(PyValueError::new_err("the embedding has another shape"));
        }
        Ok(DecodeStep {
            stepper: Mutex::new(stepper),
            shape,
            embedding,
            cache: Mutex::new(None),
        })
    }

    /// What the processor has: "avx512", "avx2" or "plain".
    #[staticmethod]
    fn level() -> String {
        Level::detect().to_string()
    }

    /// The cache of the steps to come: of each layer [slots, kv_heads, max_len, head_dim].
    fn use_cache(&self, keys: Vec<PyBuffer<f32>>, values: Vec<PyBuffer<f32>>) -> PyResult<()> {
        let s = &self.shape;
        let Some(dims) = keys.first().map(|k| k.shape().to_vec()) else {
            return Err(PyValueError::new_err("a cache without layers"));
        };
        let fits = dims.len() == 4 && dims[1] == s.kv_heads && dims[3] == s.head_dim;
        let alike = keys.iter().chain(&values).all(|b| b.shape() == dims);
        if !fits || !alike || keys.len() != s.layers || values.len() != s.layers {
            return Err(PyValueError::new_err("the cache is not one of this model"));
        }
        let count = keys.len();
        let buffers = keys.into_iter().chain(values).map(Floats::new);
        let buffers = buffers.collect::<PyResult<Vec<_>>>()?;
        let starts = buffers
            .iter()
            .map(Floats::writable)
            .collect::<PyResult<Vec<_>>>()?;
        let (keys, values) = starts.split_at(count);
        // SAFETY: the shapes were compared, and the buffers are held beside the cache.
        let cache = unsafe { Cache::new(keys.to_vec(), values.to_vec(), dims[0], dims[2]) };
        let held = Held {
            cache,
            _buffers: buffers,
        };
        // what is let go may run Python's code: not under the lock
        let old = lock(&self.cache).replace(held);
        drop(old);
        Ok(())
    }

    /// Reads one token of every row; `logits` [rows, vocab_size] is written.
    fn step(
        &self,
        py: Python<'_>,
        tokens: Vec<usize>,
        slots: Vec<usize>,
        positions: Vec<usize>,
        segments: Vec<Vec<(usize, usize, usize)>>,
        logits: PyBuffer<f32>,
    ) -> PyResult<()> {
        let count = tokens.len();
        if slots.len() != count || positions.len() != count || segments.len() != count {
            return Err(PyValueError::new_err("rows of different number"));
        }
        let rows: Vec<Row> = (0..count)
            .map(|i| Row {
                token: tokens[i],
                slot: slots[i],
                position: positions[i],
                parts: segments[i]
                    .iter()
                    .map(|&(slot, start, end)| Part { slot, start, end })
                    .collect(),
            })
            .collect();
        let logits = Floats::new(logits)?;
        let (start, length) = (logits.writable()?, logits.0.item_count());
        // SAFETY: contiguous, aligned and writable, kept alive by the buffer; the caller's alone.
        let numbers = unsafe { std::slice::from_raw_parts_mut(start, length) };
        py.detach(|| {
            let mut stepper = lock(&self.stepper);
            match &*lock(&self.cache) {
                Some(held) => {
                    Ok(stepper.step(self.embedding.numbers(), &held.cache, &rows, numbers)?)
                }
                None => Err(PyValueError::new_err("a step before use_cache")),
            }
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The token of every row of `logits` [rows, vocabulary], by its uniform number and its rule
/// (temperature, top_k, top_p, min_p).
#[pyfunction]
fn draw_tokens(
    py: Python<'_>,
    logits: PyBuffer<f32>,
    uniforms: Vec<f64>,
    rules: Vec<(f32, usize, f32, f32)>,
) -> PyResult<Vec<usize>> {
    let logits = Floats::new(logits)?;
    let width = row_width(&logits, rules.len())?;
    if uniforms.len() != rules.len() {
        return Err(PyValueError::new_err("rows of different number"));
    }
    let work = || {
        let rows = logits
            .numbers()
            .chunks_exact(width)
            .zip(&rules)
            .zip(&uniforms);
        rows.map(|((row, &(temperature, top_k, top_p, min_p)), uniform)| {
            draw(
                row,
                Rule {
                    temperature,
                    top_k,
                    top_p,
                    min_p,
                },
                *uniform,
            )
        })
        .collect()
    };
    Ok(py.detach(work))
}

/// Of every row of `logits` [rows, vocabulary] the log-probability of its token.
#[pyfunction]
fn logprobs_of(py: Python<'_>, logits: PyBuffer<f32>, tokens: Vec<usize>) -> PyResult<Vec<f64>> {
    let logits = Floats::new(logits)?;
    let width = row_width(&logits, tokens.len())?;
    if tokens.iter().any(|token| *token >= width) {
        return Err(PyValueError::new_err("a token outside the vocabulary"));
    }
    let rows = || logits.numbers().chunks_exact(width).zip(&tokens);
    Ok(py.detach(|| rows().map(|(row, token)| logprob(row, *token)).collect()))
}

fn row_width(logits: &Floats, rows: usize) -> PyResult<usize> {
    match logits.0.shape() {
        [count, width] if *count == rows && *width > 0 => Ok(*width),
        shape => Err(PyValueError::new_err(format!(
            "logits of shape {shape:?} for {rows} rows"
        ))),
    }
}

pub(crate) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<DecodeStep>()?;
    m.add_function(wrap_pyfunction!(draw_tokens, m)?)?;
    m.add_function(wrap_pyfunction!(logprobs_of, m)?)
}

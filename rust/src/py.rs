//! The Python module `fledge._bpe`: thin wrappers, the GIL released in each.
//!
//! `python/fledge/_bpe.pyi` describes it to type checkers, and
//! `python/fledge/tokenizer/reference.py` is its pure-Python twin.

use std::num::NonZero;
use std::thread;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;

use crate::error::Error;
use crate::{learn, split, Counter, Pattern};

/// Texts of about this many bytes are counted at once; memory holds one batch.
const BATCH_BYTES: usize = 16 << 20;

impl From<Error> for PyErr {
    fn from(error: Error) -> PyErr {
        PyValueError::new_err(error.to_string())
    }
}

pub(crate) fn threads_or_all(threads: Option<usize>) -> usize {
    threads.unwrap_or_else(|| thread::available_parallelism().map_or(1, NonZero::get))
}

/// The merges learnt from an iterable of str; the same for any `threads`.
#[pyfunction]
#[pyo3(signature = (texts, num_merges, pattern, threads=None))]
fn train(
    py: Python<'_>,
    texts: &Bound<'_, PyAny>,
    num_merges: usize,
    pattern: &str,
    threads: Option<usize>,
) -> PyResult<Vec<(u32, u32)>> {
    let mut counter = Counter::new(pattern.parse()?, threads_or_all(threads));
    let mut batch: Vec<PyBackedStr> = Vec::new();
    let mut bytes = 0;
    for text in texts.try_iter()? {
        let text: PyBackedStr = text?.extract()?;
        bytes += text.len();
        batch.push(text);
        if bytes >= BATCH_BYTES {
            py.detach(|| counter.add(&batch));
            py.check_signals()?; // Ctrl-C stops between batches
            batch.clear();
            bytes = 0;
        }
    }
    py.detach(|| counter.add(&batch));
    drop(batch);
    Ok(py.detach(|| learn(counter.finish(), num_merges)))
}

/// The pieces into which `pattern` cuts `text`.
#[pyfunction(name = "split")]
fn split_text<'a>(text: &'a str, pattern: &str) -> PyResult<Vec<&'a str>> {
    Ok(split(text, pattern.parse::<Pattern>()?).collect())
}

#[pymodule]
fn _bpe(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<crate::py_bpe::PyBpe>()?;
    m.add_function(wrap_pyfunction!(train, m)?)?;
    m.add_function(wrap_pyfunction!(split_text, m)?)
}

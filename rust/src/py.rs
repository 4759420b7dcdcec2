//! The Python module `fledge._bpe`: thin wrappers, the GIL released in each.
//!
//! `python/fledge/_bpe.pyi` describes it to type checkers, and
//! `python/fledge/tokenizer/reference.py` is its pure-Python twin.

use std::num::NonZero;
use std::thread;

use pyo3::exceptions::{PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::PyBytes;

use crate::error::{Error, ErrorKind};
use crate::Bpe;

impl From<Error> for PyErr {
    fn from(error: Error) -> PyErr {
        let message = error.to_string();
        match error.kind() {
            ErrorKind::Io => PyOSError::new_err(message),
            ErrorKind::Cancelled => PyRuntimeError::new_err(message),
            _ => PyValueError::new_err(message),
        }
    }
}

pub(crate) fn threads_or_all(threads: Option<usize>) -> usize {
    threads.unwrap_or_else(|| thread::available_parallelism().map_or(1, NonZero::get))
}

/// A trained byte-level BPE: split pattern and merges.
#[pyclass(name = "Bpe", module = "fledge._bpe", frozen)]
struct PyBpe(Bpe);

#[pymethods]
impl PyBpe {
    #[new]
    fn new(merges: Vec<(u32, u32)>, pattern: &str) -> PyResult<PyBpe> {
        Ok(PyBpe(Bpe::new(merges, pattern.parse()?)?))
    }

    #[getter]
    fn merges(&self) -> Vec<(u32, u32)> {
        self.0.merges().to_vec()
    }

    #[getter]
    fn pattern(&self) -> &'static str {
        self.0.pattern().name()
    }

    #[getter]
    fn num_tokens(&self) -> usize {
        self.0.num_tokens()
    }

    fn encode(&self, py: Python<'_>, text: &str) -> Vec<u32> {
        py.detach(|| self.0.encode(text))
    }

    #[pyo3(signature = (texts, threads=None))]
    fn encode_batch(
        &self,
        py: Python<'_>,
        texts: Vec<PyBackedStr>,
        threads: Option<usize>,
    ) -> Vec<Vec<u32>> {
        py.detach(|| self.0.encode_batch(&texts, threads_or_all(threads)))
    }

    fn decode_bytes<'py>(&self, py: Python<'py>, ids: Vec<u32>) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = py.detach(|| self.0.decode(&ids))?;
        Ok(PyBytes::new(py, &bytes))
    }

    fn token_bytes<'py>(&self, py: Python<'py>, id: u32) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, self.0.token(id)?))
    }
}

#[pymodule]
fn _bpe(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PyBpe>()?;
    crate::py_train::register(m)
}

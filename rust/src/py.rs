//! The Python module `fledge._bpe`: thin wrappers, the GIL released in each.
//!
//! `python/fledge/_bpe.pyi` describes it to type checkers, and
//! `python/fledge/tokenizer/reference.py` is its pure-Python twin.

use std::num::NonZero;
use std::thread;

use pyo3::exceptions::{PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;

use crate::error::{Error, ErrorKind};

impl From<Error> for PyErr {
    fn from(error: Error) -> PyErr {
        let message = error.to_string();
        match error.kind() {
            ErrorKind::Io => PyOSError::new_err(message),
            ErrorKind::Cancelled | ErrorKind::Panicked => PyRuntimeError::new_err(message),
            _ => PyValueError::new_err(message),
        }
    }
}

pub(crate) fn threads_or_all(threads: Option<usize>) -> usize {
    threads.unwrap_or_else(|| thread::available_parallelism().map_or(1, NonZero::get))
}

#[pymodule]
fn _bpe(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<crate::py_bpe::PyBpe>()?;
    m.add_class::<crate::py_bpe::Memory>()?;
    crate::py_step::register(m)?;
    crate::py_train::register(m)
}

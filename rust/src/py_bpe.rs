//! `fledge._bpe.Bpe`: encoding and decoding for Python.
//!
//! The GIL is released while ids are computed. Lists are made of int objects
//! that exist already, one for each id, because making an int costs more than
//! finding its id. Arrays come without any Python object for a number:
//! [`Ids`] lends its memory to numpy by the buffer protocol.

use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyInt, PyList};

use crate::py::threads_or_all;
use crate::Bpe;

/// A trained byte-level BPE: split pattern and merges.
#[pyclass(name = "Bpe", module = "fledge._bpe", frozen)]
pub(crate) struct PyBpe {
    bpe: Bpe,
    ints: PyOnceLock<Vec<Py<PyInt>>>, // the int of every id, made for the first list
}

#[pymethods]
impl PyBpe {
    #[new]
    fn new(merges: Vec<(u32, u32)>, pattern: &str) -> PyResult<PyBpe> {
        let (bpe, ints) = (Bpe::new(merges, pattern.parse()?)?, PyOnceLock::new());
        Ok(PyBpe { bpe, ints })
    }

    #[getter]
    fn merges(&self) -> Vec<(u32, u32)> {
        self.bpe.merges().to_vec()
    }

    #[getter]
    fn pattern(&self) -> &'static str {
        self.bpe.pattern().name()
    }

    #[getter]
    fn num_tokens(&self) -> usize {
        self.bpe.num_tokens()
    }

    fn encode<'py>(&self, py: Python<'py>, text: &str) -> PyResult<Bound<'py, PyList>> {
        let ids = py.detach(|| self.bpe.encode(text));
        self.list(py, &ids)
    }

    #[pyo3(signature = (texts, threads=None))]
    fn encode_batch<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<PyBackedStr>,
        threads: Option<usize>,
    ) -> PyResult<Bound<'py, PyList>> {
        let threads = threads_or_all(threads);
        let (ids, offsets) = py.detach(|| self.bpe.encode_flat(&texts, threads));
        let lists = offsets
            .windows(2)
            .map(|range| self.list(py, &ids[range[0]..range[1]]))
            .collect::<PyResult<Vec<_>>>()?;
        PyList::new(py, lists)
    }

    fn decode_bytes<'py>(&self, py: Python<'py>, ids: Vec<u32>) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = py.detach(|| self.bpe.decode(&ids))?;
        Ok(PyBytes::new(py, &bytes))
    }

    fn token_bytes<'py>(&self, py: Python<'py>, id: u32) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, self.bpe.token(id)?))
    }
}

impl PyBpe {
    fn list<'py>(&self, py: Python<'py>, ids: &[u32]) -> PyResult<Bound<'py, PyList>> {
        let make = |id: u32| id.into_pyobject(py).map(Bound::unbind);
        let ints = self.ints.get_or_try_init(py, || {
            (0..self.bpe.num_tokens() as u32).map(make).collect::<Result<_, _>>()
        })?;
        PyList::new(py, ids.iter().map(|&id| ints[id as usize].clone_ref(py)))
    }
}

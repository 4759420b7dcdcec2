//! `fledge._bpe.Bpe`: encoding and decoding for Python.
//!
//! The GIL is released while ids are computed. Lists are made of int objects
//! that exist already, one for each id, because making an int costs more than
//! finding its id. Arrays come without any Python object for a number: as a
//! bytearray that numpy takes for its memory.

use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyByteArray, PyBytes, PyInt, PyList};

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

    /// The ids as the bytes of an array of u16 or u32.
    #[pyo3(signature = (text, *, wide))]
    fn encode_array<'py>(
        &self,
        py: Python<'py>,
        text: &str,
        wide: bool,
    ) -> Bound<'py, PyByteArray> {
        if wide {
            array(py, &py.detach(|| self.bpe.encode(text)))
        } else {
            array(py, &py.detach(|| self.bpe.encode_u16(text)))
        }
    }

    /// The ids of all texts as one such array, and where each text begins and ends in it (u64).
    #[pyo3(signature = (texts, threads=None, *, wide))]
    fn encode_batch_array<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<PyBackedStr>,
        threads: Option<usize>,
        wide: bool,
    ) -> (Bound<'py, PyByteArray>, Bound<'py, PyByteArray>) {
        let threads = threads_or_all(threads);
        let offsets = |found: Vec<usize>| -> Vec<u64> { found.iter().map(|&i| i as u64).collect() };
        if wide {
            let (ids, ends) = py.detach(|| self.bpe.encode_flat(&texts, threads));
            (array(py, &ids), array(py, &offsets(ends)))
        } else {
            let (ids, ends) = py.detach(|| self.bpe.encode_flat_u16(&texts, threads));
            (array(py, &ids), array(py, &offsets(ends)))
        }
    }

    fn count(&self, py: Python<'_>, text: &str) -> usize {
        py.detach(|| self.bpe.count(text))
    }

    /// `decode_bytes` of an array of u32 given by its bytes.
    fn decode_array<'py>(&self, py: Python<'py>, ids: &[u8]) -> PyResult<Bound<'py, PyBytes>> {
        let ids: Vec<u32> = ids
            .chunks_exact(4)
            .map(|four| u32::from_ne_bytes(four.try_into().expect("four bytes")))
            .collect();
        let bytes = py.detach(|| self.bpe.decode(&ids))?;
        Ok(PyBytes::new(py, &bytes))
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
            (0..self.bpe.num_tokens() as u32)
                .map(make)
                .collect::<Result<_, _>>()
        })?;
        PyList::new(py, ids.iter().map(|&id| ints[id as usize].clone_ref(py)))
    }
}

/// The memory of some numbers as a bytearray, in the machine's byte order.
fn array<'py, T: Copy + Number>(py: Python<'py>, numbers: &[T]) -> Bound<'py, PyByteArray> {
    // SAFETY: a slice of integers is that many initialised bytes without padding.
    let bytes = unsafe {
        std::slice::from_raw_parts(
            numbers.as_ptr().cast::<u8>(),
            std::mem::size_of_val(numbers),
        )
    };
    PyByteArray::new(py, bytes)
}

/// The integers whose memory [`array`] may look at.
trait Number {}
impl Number for u16 {}
impl Number for u32 {}
impl Number for u64 {}

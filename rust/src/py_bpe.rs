//! `fledge._bpe.Bpe`: encoding and decoding for Python.
//!
//! The GIL is released while ids are computed, unless the text is so short that
//! releasing it costs more than it gives. Lists are made of int objects that
//! exist already, one for each id, because making an int costs more than
//! finding its id. Arrays come without any Python object for a number: as an
//! object whose memory numpy takes for its own, without a copy. What calls the
//! C API directly does so because the checked way costs several times the work
//! itself, for each id.

use std::ffi::{c_int, CString};
use std::mem::ManuallyDrop;

use pyo3::exceptions::{PyOverflowError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::pybacked::{PyBackedBytes, PyBackedStr};
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyInt, PyList, PyString};

use crate::py::threads_or_all;
use crate::Bpe;

/// Texts and ids of less than this many bytes are worked on with the GIL held:
/// it takes some ten microseconds.
const SHORT_BYTES: usize = 1 << 13;

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
        Ok(Bpe::new(merges, pattern.parse()?)?.into())
    }

    /// The BPE of tokens in the order of their ranks, as tiktoken has it.
    #[staticmethod]
    fn from_ranks(tokens: Vec<PyBackedBytes>, pattern: &str) -> PyResult<PyBpe> {
        let ranks = tokens.iter().map(|token| token.to_vec()).zip(0..).collect();
        Ok(Bpe::from_ranks(ranks, pattern.parse()?)?.into())
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
        let ids = released(py, text.len(), || self.bpe.encode(text));
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

    /// The ids as the memory of an array of u16.
    fn encode_u16(&self, py: Python<'_>, text: &str) -> PyResult<Memory> {
        self.check_narrow()?;
        Ok(released(py, text.len(), || self.bpe.encode_u16(text)).into())
    }

    /// The ids as the memory of an array of u32.
    fn encode_u32(&self, py: Python<'_>, text: &str) -> Memory {
        released(py, text.len(), || self.bpe.encode(text)).into()
    }

    /// The ids of all texts as one such array, and where each text begins and ends in it (u64).
    #[pyo3(signature = (texts, threads=None))]
    fn encode_batch_u16(
        &self,
        py: Python<'_>,
        texts: Vec<PyBackedStr>,
        threads: Option<usize>,
    ) -> PyResult<(Memory, Memory)> {
        self.check_narrow()?;
        let threads = threads_or_all(threads);
        let (ids, ends) = py.detach(|| self.bpe.encode_flat_u16(&texts, threads));
        Ok((ids.into(), wide(ends).into()))
    }

    /// The same as an array of u32.
    #[pyo3(signature = (texts, threads=None))]
    fn encode_batch_u32(
        &self,
        py: Python<'_>,
        texts: Vec<PyBackedStr>,
        threads: Option<usize>,
    ) -> (Memory, Memory) {
        let threads = threads_or_all(threads);
        let (ids, ends) = py.detach(|| self.bpe.encode_flat(&texts, threads));
        (ids.into(), wide(ends).into())
    }

    fn count(&self, py: Python<'_>, text: &str) -> usize {
        released(py, text.len(), || self.bpe.count(text))
    }

    /// The text of `ids`; `errors` says what becomes of bytes that are no UTF-8.
    fn decode<'py>(
        &self,
        py: Python<'py>,
        ids: &Bound<'py, PyList>,
        errors: &str,
    ) -> PyResult<Bound<'py, PyString>> {
        let ids = numbers(ids)?;
        let bytes = released(py, 4 * ids.len(), || self.bpe.decode(&ids))?;
        let errors = CString::new(errors)?;
        let len = bytes.len() as ffi::Py_ssize_t; // a Vec is no longer than that
                                                  // SAFETY: `bytes` and `errors` live during the call, which returns a new reference to a
                                                  // str, or NULL with an exception set.
        unsafe {
            let text = ffi::PyUnicode_DecodeUTF8(bytes.as_ptr().cast(), len, errors.as_ptr());
            Ok(Bound::from_owned_ptr_or_err(py, text)?.cast_into_unchecked())
        }
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

    fn decode_bytes<'py>(
        &self,
        py: Python<'py>,
        ids: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let ids: Vec<u32> = match ids.cast::<PyList>() {
            Ok(list) => numbers(list)?,
            Err(_) => ids.extract()?,
        };
        let bytes = released(py, 4 * ids.len(), || self.bpe.decode(&ids))?;
        Ok(PyBytes::new(py, &bytes))
    }

    fn token_bytes<'py>(&self, py: Python<'py>, id: u32) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, self.bpe.token(id)?))
    }
}

impl From<Bpe> for PyBpe {
    fn from(bpe: Bpe) -> PyBpe {
        let ints = PyOnceLock::new();
        PyBpe { bpe, ints }
    }
}

impl PyBpe {
    fn check_narrow(&self) -> PyResult<()> {
        if self.bpe.num_tokens() <= 1 << 16 {
            return Ok(());
        }
        let message = format!("{} tokens do not fit 16 bits", self.bpe.num_tokens());
        Err(PyValueError::new_err(message))
    }

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

/// What `compute` gives, the GIL released if there are `bytes` enough.
fn released<T: Send>(py: Python<'_>, bytes: usize, compute: impl FnOnce() -> T + Send) -> T {
    if bytes < SHORT_BYTES {
        compute()
    } else {
        py.detach(compute)
    }
}

/// The numbers of a list of ids; OverflowError for what no id can be.
fn numbers(list: &Bound<'_, PyList>) -> PyResult<Vec<u32>> {
    let mut len = list.len();
    let mut numbers = Vec::with_capacity(len);
    while numbers.len() < len {
        // SAFETY: the place is below the length, for the list can only have changed where Python
        // code ran, and then it was asked again. The reference is borrowed from the list;
        // PyLong_AsLongLong calls no Python code for an int, and for anything else it is kept alive.
        let number = unsafe {
            let item = ffi::PyList_GetItem(list.as_ptr(), numbers.len() as ffi::Py_ssize_t);
            if ffi::PyLong_CheckExact(item) != 0 {
                ffi::PyLong_AsLongLong(item)
            } else {
                let number = Bound::from_borrowed_ptr(list.py(), item).extract::<i64>()?;
                len = list.len(); // its `__index__` may have changed the list
                number
            }
        };
        let Ok(id) = u32::try_from(number) else {
            let error = PyErr::take(list.py());
            return Err(error.unwrap_or_else(|| {
                PyOverflowError::new_err("an id below 0, or of more than 32 bits")
            }));
        };
        numbers.push(id);
    }
    Ok(numbers)
}

fn wide(offsets: Vec<usize>) -> Vec<u64> {
    offsets.into_iter().map(|offset| offset as u64).collect()
}

/// Numbers that Python sees as memory (the buffer protocol), and may write to.
#[pyclass(module = "fledge._bpe", frozen)]
pub(crate) struct Memory {
    start: *mut u8,
    num_bytes: usize,
    capacity: usize,                 // of the Vec that it was
    free: unsafe fn(*mut u8, usize), // start, capacity
}

// SAFETY: the memory belongs to this object alone, which never looks into it; what Python does
// with it is Python's to order.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

/// Integers, of which any bytes are one.
trait Number: Copy {}
impl Number for u16 {}
impl Number for u32 {}
impl Number for u64 {}

impl<T: Number> From<Vec<T>> for Memory {
    fn from(numbers: Vec<T>) -> Memory {
        let mut numbers = ManuallyDrop::new(numbers);
        Memory {
            start: numbers.as_mut_ptr().cast(),
            num_bytes: size_of_val(numbers.as_slice()),
            capacity: numbers.capacity(),
            free: free::<T>,
        }
    }
}

/// # Safety
///
/// `start` and `capacity` are those of a `Vec<T>` that nobody uses any more.
unsafe fn free<T: Number>(start: *mut u8, capacity: usize) {
    // SAFETY: the caller's promise; numbers need no drop, so that the length does not matter.
    drop(unsafe { Vec::<T>::from_raw_parts(start.cast(), 0, capacity) });
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: both come from a Vec of the type that `free` was made for. A view holds a
        // reference to this object, so there is none any more.
        unsafe { (self.free)(self.start, self.capacity) }
    }
}

#[pymethods]
impl Memory {
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let (memory, writable) = (slf.get(), 0);
        let len = memory.num_bytes as ffi::Py_ssize_t; // a Vec is no longer than that
                                                       // SAFETY: Python calls this with a view to fill in; the memory lives as long as `slf`, to
                                                       // which the filled-in view holds a reference.
        let status = unsafe {
            ffi::PyBuffer_FillInfo(
                view,
                slf.as_ptr(),
                memory.start.cast(),
                len,
                writable,
                flags,
            )
        };
        if status == 0 {
            Ok(())
        } else {
            Err(PyErr::fetch(slf.py()))
        }
    }
}

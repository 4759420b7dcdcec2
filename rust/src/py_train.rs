//! Training and splitting in `fledge._bpe`: thin wrappers, the GIL released while they work.
//!
//! Ten times a second they take the GIL back to let Ctrl-C through and to call `progress`. A
//! Python exception from there, or from the iterable of texts, comes out unchanged.

use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyString;

use crate::py::threads_or_all;
use crate::{learn_until, split, Error, Pattern, PieceCounts};

/// Texts of about this many bytes are counted at once; memory holds one batch.
const BATCH_BYTES: usize = 16 << 20;
const CHECK_EVERY: Duration = Duration::from_millis(50);
const REPORT_EVERY: Duration = Duration::from_millis(100);

/// The UTF-8 of a Python str, outside of it: asking the str itself would make it keep a second
/// copy of its text for good.
struct Utf8(PyBackedBytes);

impl Utf8 {
    fn new(text: &Bound<'_, PyAny>) -> PyResult<Utf8> {
        Ok(Utf8(text.cast::<PyString>()?.encode_utf8()?.into()))
    }
}

impl AsRef<str> for Utf8 {
    fn as_ref(&self) -> &str {
        // SAFETY: the bytes come from `str.encode("utf-8")` and nobody changes a Python bytes.
        unsafe { std::str::from_utf8_unchecked(&self.0) }
    }
}

/// Lets signals and the user's progress function in, now and then.
struct Monitor<'a> {
    progress: Option<&'a Py<PyAny>>,
    phase: &'static str,
    total: Option<u64>,
    checked: Instant,
    reported: Option<Instant>,
    error: Option<PyErr>,
}

impl<'a> Monitor<'a> {
    fn new(progress: Option<&'a Py<PyAny>>, phase: &'static str, total: Option<u64>) -> Self {
        Monitor {
            progress,
            phase,
            total,
            checked: Instant::now(),
            reported: None,
            error: None,
        }
    }

    /// Whether to stop; `done` is what `progress` hears.
    fn stop(&mut self, done: u64) -> bool {
        if self.checked.elapsed() < CHECK_EVERY {
            return false;
        }
        self.checked = Instant::now();
        let due = self
            .reported
            .is_none_or(|last| last.elapsed() >= REPORT_EVERY);
        let result = Python::attach(|py| {
            py.check_signals()?;
            if due {
                self.report(py, done)?;
            }
            Ok(())
        });
        self.error = result.err();
        self.error.is_some()
    }

    fn report(&mut self, py: Python<'_>, done: u64) -> PyResult<()> {
        self.reported = Some(Instant::now());
        if let Some(progress) = self.progress {
            progress.call1(py, (self.phase, done, self.total))?;
        }
        Ok(())
    }

    /// `result`, or the exception that made it fail.
    fn settle<T>(&mut self, result: Result<T, Error>) -> PyResult<T> {
        match self.error.take() {
            Some(error) => Err(error),
            None => result.map_err(PyErr::from),
        }
    }
}

/// Counts pieces of texts that come in any number of calls, and learns merges from them.
#[pyclass(name = "Counter", module = "fledge._bpe")]
struct PyCounter(crate::Counter);

#[pymethods]
impl PyCounter {
    #[new]
    #[pyo3(signature = (pattern, threads=None, *, max_memory_bytes=None, spill_folder=None))]
    fn new(
        pattern: &str,
        threads: Option<usize>,
        max_memory_bytes: Option<usize>,
        spill_folder: Option<PathBuf>,
    ) -> PyResult<PyCounter> {
        let mut counter = crate::Counter::new(pattern.parse()?, threads_or_all(threads));
        if let Some(bytes) = max_memory_bytes {
            counter = counter.max_memory(bytes);
        }
        if let Some(folder) = spill_folder {
            counter = counter.spill_folder(folder);
        }
        Ok(PyCounter(counter))
    }

    #[getter]
    fn pattern(&self) -> &'static str {
        self.0.pattern().name()
    }

    #[getter]
    fn num_texts(&self) -> u64 {
        self.0.num_texts()
    }

    #[getter]
    fn num_bytes(&self) -> u64 {
        self.0.num_bytes()
    }

    /// Counts the pieces of an iterable of str.
    #[pyo3(signature = (texts, *, progress=None, total_bytes=None))]
    fn add(
        &mut self,
        py: Python<'_>,
        texts: &Bound<'_, PyAny>,
        progress: Option<Py<PyAny>>,
        total_bytes: Option<u64>,
    ) -> PyResult<()> {
        let mut monitor = Monitor::new(progress.as_ref(), "count", total_bytes);
        let result = self.add_all(py, texts, &mut monitor);
        if result.is_err() {
            self.0.mark_incomplete();
        }
        result
    }

    /// Counts a file of UTF-8 as one text.
    #[pyo3(signature = (path, *, progress=None))]
    fn add_file(
        &mut self,
        py: Python<'_>,
        path: PathBuf,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        let fail = |e: std::io::Error| PyOSError::new_err(format!("{}: {e}", path.display()));
        let file = File::open(&path).map_err(fail)?;
        let total = file.metadata().map_err(fail)?.len();
        let mut monitor = Monitor::new(progress.as_ref(), "count", Some(total));
        let before = self.0.num_bytes();
        let result = py.detach(|| self.0.add_reader(file, &mut |done| monitor.stop(done)));
        monitor.settle(result)?;
        monitor.report(py, self.0.num_bytes() - before)
    }

    /// Writes the counts to a file.
    fn save(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        Ok(py.detach(|| self.0.save(path))?)
    }

    /// Adds the counts of a saved file.
    fn add_saved(&mut self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        Ok(py.detach(|| self.0.add_saved(path))?)
    }

    /// The merges that the counts give.
    #[pyo3(signature = (num_merges, *, progress=None))]
    fn learn(
        &self,
        py: Python<'_>,
        num_merges: usize,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Vec<(u32, u32)>> {
        let pieces = py.detach(|| self.0.finish())?;
        learn(py, pieces, num_merges, progress.as_ref())
    }
}

impl PyCounter {
    fn add_all(
        &mut self,
        py: Python<'_>,
        texts: &Bound<'_, PyAny>,
        monitor: &mut Monitor<'_>,
    ) -> PyResult<()> {
        let before = self.0.num_bytes();
        let mut batch: Vec<Utf8> = Vec::new();
        let mut bytes = 0;
        let mut texts = texts.try_iter()?;
        loop {
            let text = texts.next().transpose()?;
            let is_last = text.is_none();
            if let Some(text) = text {
                let text = Utf8::new(&text)?;
                bytes += text.0.len();
                batch.push(text);
            }
            if bytes >= BATCH_BYTES || is_last {
                let done = self.0.num_bytes() - before;
                let result = py.detach(|| {
                    self.0
                        .add_until(&batch, &mut |more| monitor.stop(done + more))
                });
                monitor.settle(result)?;
                batch.clear();
                bytes = 0;
            }
            if is_last {
                return monitor.report(py, self.0.num_bytes() - before);
            }
        }
    }
}

fn learn(
    py: Python<'_>,
    pieces: PieceCounts,
    num_merges: usize,
    progress: Option<&Py<PyAny>>,
) -> PyResult<Vec<(u32, u32)>> {
    let mut monitor = Monitor::new(progress, "merge", Some(num_merges as u64));
    let result =
        py.detach(|| learn_until(&pieces, num_merges, &mut |done| monitor.stop(done as u64)));
    let merges = monitor.settle(result)?;
    monitor.report(py, merges.len() as u64)?;
    Ok(merges)
}

/// The merges learnt from an iterable of str; the same for any `threads`.
#[pyfunction]
#[pyo3(signature = (
    texts, num_merges, pattern, threads=None, progress=None, *, total_bytes=None,
    max_memory_bytes=None
))]
#[allow(clippy::too_many_arguments)] // they are keywords in Python
fn train(
    py: Python<'_>,
    texts: &Bound<'_, PyAny>,
    num_merges: usize,
    pattern: &str,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
    total_bytes: Option<u64>,
    max_memory_bytes: Option<usize>,
) -> PyResult<Vec<(u32, u32)>> {
    let mut counter = PyCounter::new(pattern, threads, max_memory_bytes, None)?;
    let mut monitor = Monitor::new(progress.as_ref(), "count", total_bytes);
    counter.add_all(py, texts, &mut monitor)?;
    let pieces = py.detach(|| counter.0.finish())?;
    drop(counter);
    learn(py, pieces, num_merges, progress.as_ref())
}

/// The pieces into which `pattern` cuts `text`.
#[pyfunction(name = "split")]
fn split_text<'a>(text: &'a str, pattern: &str) -> PyResult<Vec<&'a str>> {
    Ok(split(text, pattern.parse::<Pattern>()?).collect())
}

/// The regex that a pattern's name stands for.
#[pyfunction]
fn pattern_regex(pattern: &str) -> PyResult<&'static str> {
    Ok(pattern.parse::<Pattern>()?.regex())
}

/// Adds what this file has to the module.
pub(crate) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PyCounter>()?;
    m.add_function(wrap_pyfunction!(train, m)?)?;
    m.add_function(wrap_pyfunction!(split_text, m)?)?;
    m.add_function(wrap_pyfunction!(pattern_regex, m)?)
}

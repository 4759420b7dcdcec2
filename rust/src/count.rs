//! Counting the pieces of a corpus on all threads, in bounded memory.
//!
//! A corpus of any size shrinks to its distinct pieces. Each thread takes parts of the texts (long
//! texts are cut where no piece can be changed by it) and counts into a table of its own; the
//! tables are added up at the end, each thread taking the pieces of its share of hash values.
//! Counts are u64 and sums do not depend on order, so the result depends neither on the number of
//! threads nor on the order of the texts.
//!
//! # Bounded memory
//!
//! When the table of a thread reaches its part of `max_memory`, it goes to a temporary file as a
//! sorted run, and starts anew; [`Counter::finish`] merges the runs. Nothing is lost by that. But
//! learning needs the distinct pieces in memory: where all of them together have more than
//! `max_memory / 32` bytes, those with the smallest counts are left out, and always all with the
//! same count, so that this too depends on the corpus alone.
//!
//! `train` and the Python module call this. It never learns merges and never sees special tokens.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crate::count_file::{self, Header, Merged, Run, Source};
use crate::error::{Error, ErrorKind};
use crate::split::{split, Pattern};
use crate::table::{PieceCounts, PieceTable};

/// What counting and learning may take unless told otherwise.
pub const DEFAULT_MEMORY: usize = 2 << 30;
/// Learning takes about this many bytes for each byte of the distinct pieces.
const LEARN_FACTOR: usize = 32;
/// A thread takes texts of about this many bytes at a time, and longer ones are cut.
const PART_BYTES: usize = 1 << 18;
/// A reader is read in chunks of this many bytes.
const READ_BYTES: u64 = 16 << 20;
/// A thread's table may have this much in any case, in bytes.
const MIN_MEMORY: usize = 1 << 16;
/// More runs than this are merged into fewer.
const MAX_RUNS: usize = 32;
/// After this many pieces a thread looks whether its table has outgrown its memory.
const CHECK_PIECES: usize = 1 << 12;
/// How often the calling thread asks whether to stop while others count the last parts.
const BETWEEN_STOPS: Duration = Duration::from_millis(20);
/// Rare pieces are left out by their counts up to this one.
const MAX_THRESHOLD: usize = 1 << 16;

/// Counts the pieces of texts that arrive in batches.
pub struct Counter {
    pattern: Pattern,
    tables: Vec<PieceTable>, // one per thread
    runs: Vec<Run>,
    max_memory: usize,
    spill_folder: PathBuf,
    num_texts: u64,
    num_bytes: u64,
    incomplete: bool,
}

impl Counter {
    /// An empty counter that works on `threads` threads (at least one).
    pub fn new(pattern: Pattern, threads: usize) -> Counter {
        Counter {
            pattern,
            tables: (0..threads.max(1)).map(|_| PieceTable::default()).collect(),
            runs: Vec::new(),
            max_memory: DEFAULT_MEMORY,
            spill_folder: std::env::temp_dir(),
            num_texts: 0,
            num_bytes: 0,
            incomplete: false,
        }
    }

    /// Takes at most about `bytes` of memory for tables (see the module's text).
    #[must_use]
    pub fn max_memory(mut self, bytes: usize) -> Counter {
        self.max_memory = bytes;
        self
    }

    /// Puts what does not fit into memory there instead of the system's temporary folder.
    #[must_use]
    pub fn spill_folder(mut self, folder: impl Into<PathBuf>) -> Counter {
        self.spill_folder = folder.into();
        self
    }

    /// The pattern by which texts are cut.
    pub fn pattern(&self) -> Pattern {
        self.pattern
    }

    /// How many texts were counted.
    pub fn num_texts(&self) -> u64 {
        self.num_texts
    }

    /// How many bytes were counted.
    pub fn num_bytes(&self) -> u64 {
        self.num_bytes
    }

    /// Whether a call of `add` was stopped half-way, so that the counts belong to no set of texts.
    pub fn is_incomplete(&self) -> bool {
        self.incomplete
    }

    /// Counts the pieces of `texts`; returns when all are counted.
    ///
    /// Fails where memory is used up and the temporary file cannot be written.
    pub fn add<S: AsRef<str> + Sync>(&mut self, texts: &[S]) -> Result<(), Error> {
        self.add_until(texts, &mut |_| false)
    }

    /// [`Counter::add`] that asks `stop` several times a second, on the calling thread, with the
    /// bytes counted so far in this call; true stops it.
    ///
    /// It then fails with [`ErrorKind::Cancelled`], and so does every later use of the counts.
    pub fn add_until<S: AsRef<str> + Sync>(
        &mut self,
        texts: &[S],
        stop: &mut dyn FnMut(u64) -> bool,
    ) -> Result<(), Error> {
        self.check_complete()?;
        let parts = parts(texts, self.pattern);
        let work = Work {
            parts: &parts,
            pattern: self.pattern,
            max_memory: self.memory_per_thread(),
            spill_folder: &self.spill_folder,
            next: AtomicUsize::new(0),
            bytes: AtomicU64::new(0),
            stopped: AtomicBool::new(stop(0)),
        };
        let (mine, others) = self.tables.split_first_mut().expect("at least one table");
        let num_others = others.len().min(parts.len().saturating_sub(1));
        let results: Vec<Result<Vec<Run>, Error>> = thread::scope(|scope| {
            let work = &work;
            let others: Vec<_> = others
                .iter_mut()
                .take(num_others)
                .map(|table| scope.spawn(move || work.run(table, &mut |_| false)))
                .collect();
            let first = work.run(mine, stop);
            // the last parts may be in the hands of others: go on asking for them
            while others.iter().any(|thread| !thread.is_finished()) {
                if stop(work.bytes.load(Ordering::Relaxed)) {
                    work.stopped.store(true, Ordering::Relaxed);
                }
                thread::sleep(BETWEEN_STOPS);
            }
            let rest = others.into_iter().map(|thread| match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            std::iter::once(first).chain(rest).collect()
        });
        self.incomplete = true; // until it is known to be otherwise
        for runs in results {
            self.runs.extend(runs?);
        }
        let (stopped, bytes) = (work.stopped.into_inner(), work.bytes.into_inner());
        if stopped {
            return self.check_complete();
        }
        self.compact()?;
        self.incomplete = false;
        self.num_texts += texts.len() as u64;
        self.num_bytes += bytes;
        Ok(())
    }

    /// Counts the UTF-8 of `reader` as one text, a few megabytes at a time.
    ///
    /// `stop` is asked as in [`Counter::add_until`]. Fails with [`ErrorKind::Io`] where reading
    /// fails or what is read is not UTF-8; the counts are incomplete then.
    pub fn add_reader(
        &mut self,
        mut reader: impl Read,
        stop: &mut dyn FnMut(u64) -> bool,
    ) -> Result<(), Error> {
        self.check_complete()?;
        self.incomplete = true;
        let fail = |why: String| Error::new(ErrorKind::Io, format!("the text to count: {why}"));
        let (num_texts, before) = (self.num_texts, self.num_bytes);
        let mut bytes = Vec::new();
        loop {
            let chunk = reader.by_ref().take(READ_BYTES).read_to_end(&mut bytes);
            let is_last = chunk.map_err(|error| fail(error.to_string()))? == 0;
            let text = match std::str::from_utf8(&bytes) {
                Ok(text) => text,
                // The last character may go on in the next chunk.
                Err(error) if error.error_len().is_none() && !is_last => {
                    std::str::from_utf8(&bytes[..error.valid_up_to()]).expect("valid up to there")
                }
                Err(error) => return Err(fail(error.to_string())),
            };
            let near_end = text.len().saturating_sub(PART_BYTES / 4);
            let cut = match self.pattern.safe_cut(text, near_end) {
                _ if is_last => Some(text.len()),
                cut => cut,
            };
            if let Some(cut) = cut {
                self.incomplete = false;
                let done = self.num_bytes - before;
                let result = self.add_until(&[&text[..cut]], &mut |more| stop(done + more));
                self.incomplete = true;
                result?;
                bytes.drain(..cut);
            }
            if is_last {
                self.num_texts = num_texts + 1;
                self.incomplete = false;
                return Ok(());
            }
        }
    }

    /// Declares that the counts belong to no set of texts: the caller gave only some of them.
    pub fn mark_incomplete(&mut self) {
        self.incomplete = true;
    }

    fn memory_per_thread(&self) -> usize {
        (self.max_memory / self.tables.len()).max(MIN_MEMORY)
    }

    /// Merges runs while they are more than can be open at once.
    fn compact(&mut self) -> Result<(), Error> {
        while self.runs.len() > MAX_RUNS {
            let some: Vec<Run> = self.runs.drain(..MAX_RUNS).collect();
            let mut sources: Vec<Source<'_>> = Vec::new();
            for run in &some {
                sources.push(Box::new(run.read()?));
            }
            let run = Run::write(&self.spill_folder, Merged::new(sources)?)?;
            self.runs.push(run);
        }
        Ok(())
    }

    fn check_complete(&self) -> Result<(), Error> {
        if !self.incomplete {
            return Ok(());
        }
        let message = "counting was stopped inside a batch of texts, so its counts are incomplete";
        Err(Error::new(ErrorKind::Cancelled, message))
    }

    /// Every distinct piece with its count, in no particular order.
    ///
    /// Where they are too many for the memory, without the rarest (see the module's text).
    pub fn finish(&self) -> Result<PieceCounts, Error> {
        self.check_complete()?;
        let limit = self.max_memory / LEARN_FACTOR;
        if !self.runs.is_empty() {
            let mut sizes = Sizes::default();
            for entry in self.merged()? {
                let (piece, count) = entry?;
                sizes.add(&piece, count);
            }
            let threshold = sizes.threshold(limit)?;
            let mut all = PieceCounts::default();
            for entry in self.merged()? {
                let (piece, count) = entry?;
                if count >= threshold {
                    all.push(&piece, count);
                }
            }
            return Ok(all);
        }
        let shards = match self.tables.len() {
            1 => &self.tables,
            _ => &self.added_up(),
        };
        let mut sizes = Sizes::default();
        for table in shards {
            table.for_each(0, 1, |piece, count| sizes.add(piece, count));
        }
        let threshold = sizes.threshold(limit)?;
        let mut all = PieceCounts::default();
        for table in shards {
            table.for_each(0, 1, |piece, count| {
                if count >= threshold {
                    all.push(piece, count);
                }
            });
        }
        Ok(all)
    }

    /// The tables of all threads as disjoint ones, by hash value.
    fn added_up(&self) -> Vec<PieceTable> {
        let shards = self.tables.len() as u64;
        let add_up = |shard| {
            let most = self.tables.iter().map(PieceTable::len).sum::<usize>() / shards as usize;
            let mut sum = PieceTable::for_pieces(most + most / 16);
            for table in &self.tables {
                table.for_each(shard, shards, |piece, count| sum.add(piece, count));
            }
            sum
        };
        thread::scope(|scope| {
            let add_up = &add_up;
            let threads: Vec<_> = (0..shards)
                .map(|shard| scope.spawn(move || add_up(shard)))
                .collect();
            let join = |thread: thread::ScopedJoinHandle<'_, PieceTable>| match thread.join() {
                Ok(table) => table,
                Err(panic) => std::panic::resume_unwind(panic),
            };
            threads.into_iter().map(join).collect()
        })
    }

    /// All entries in the order of the pieces, runs and tables together.
    fn merged(&self) -> Result<Merged<'_>, Error> {
        let mut sources: Vec<Source<'_>> = Vec::new();
        for run in &self.runs {
            sources.push(Box::new(run.read()?));
        }
        for table in &self.tables {
            sources.push(Box::new(table.sorted().map(Ok)));
        }
        Merged::new(sources)
    }

    /// Writes the counts to a file, whole or not at all; the same counts give the same file.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        self.check_complete()?;
        let mut num_entries = 0;
        for entry in self.merged()? {
            entry?;
            num_entries += 1;
        }
        let header = Header {
            pattern: self.pattern.name().to_owned(),
            num_texts: self.num_texts,
            num_bytes: self.num_bytes,
            num_entries,
        };
        count_file::save(path.as_ref(), &header, self.merged()?)
    }

    /// Adds the counts of a file that [`Counter::save`] wrote.
    ///
    /// A file that is damaged or made with another pattern is an error, and then nothing of it is
    /// counted.
    pub fn add_saved(&mut self, path: impl AsRef<Path>) -> Result<(), Error> {
        self.check_complete()?;
        let path = path.as_ref();
        let (header, entries) = count_file::load(path)?;
        if header.pattern != self.pattern.name() {
            let message = format!(
                "{} counts pieces of the pattern {}, not of {}",
                path.display(),
                header.pattern,
                self.pattern.name()
            );
            return Err(Error::new(ErrorKind::CorruptCounts, message));
        }
        for entry in entries {
            entry?; // to the checksum, before anything counts
        }
        let max_memory = self.memory_per_thread();
        self.incomplete = true; // should the disk fail now
        for entry in count_file::load(path)?.1 {
            let (piece, count) = entry?;
            self.tables[0].add(&piece, count);
            if self.tables[0].memory() > max_memory {
                let table = std::mem::take(&mut self.tables[0]);
                let run = Run::write(&self.spill_folder, table.sorted().map(Ok))?;
                self.runs.push(run);
            }
        }
        self.compact()?;
        self.incomplete = false;
        self.num_texts += header.num_texts;
        self.num_bytes += header.num_bytes;
        Ok(())
    }

    /// The name of the pattern of a saved file, without reading its counts.
    pub fn saved_pattern(path: impl AsRef<Path>) -> Result<Pattern, Error> {
        count_file::load(path.as_ref())?.0.pattern.parse()
    }
}

/// How many bytes of distinct pieces there are by count.
struct Sizes(Vec<usize>);

impl Default for Sizes {
    fn default() -> Self {
        Sizes(vec![0; MAX_THRESHOLD + 1])
    }
}

impl Sizes {
    fn add(&mut self, piece: &[u8], count: u64) {
        self.0[count.min(MAX_THRESHOLD as u64) as usize] += piece.len();
    }

    /// The smallest count whose pieces, and all more frequent ones, fit into `limit` bytes.
    fn threshold(&self, limit: usize) -> Result<u64, Error> {
        let mut bytes = 0;
        for (count, size) in self.0.iter().enumerate().rev() {
            bytes += size;
            if bytes > limit {
                if count == MAX_THRESHOLD {
                    break;
                }
                return Ok(count as u64 + 1);
            }
        }
        if bytes <= limit {
            return Ok(0);
        }
        let message = format!("the frequent pieces alone have more than {limit} bytes");
        Err(Error::new(ErrorKind::TooLarge, message))
    }
}

/// `texts` as lists of parts, each of about [`PART_BYTES`] or of one text that cannot be cut.
fn parts<'a, S: AsRef<str>>(texts: &'a [S], pattern: Pattern) -> Vec<Vec<&'a str>> {
    let mut parts = Vec::new();
    let mut part: Vec<&str> = Vec::new();
    let mut bytes = 0;
    let mut push = |text: &'a str, bytes: &mut usize, part: &mut Vec<&'a str>| {
        part.push(text);
        *bytes += text.len();
        if *bytes >= PART_BYTES {
            parts.push(std::mem::take(part));
            *bytes = 0;
        }
    };
    for text in texts {
        let mut text = text.as_ref();
        while text.len() > 2 * PART_BYTES {
            let Some(at) = pattern.safe_cut(text, PART_BYTES) else {
                break;
            };
            push(&text[..at], &mut bytes, &mut part);
            text = &text[at..];
        }
        push(text, &mut bytes, &mut part);
    }
    parts.push(part);
    parts
}

/// What the threads of one call share.
struct Work<'a> {
    parts: &'a [Vec<&'a str>],
    pattern: Pattern,
    max_memory: usize,
    spill_folder: &'a Path,
    next: AtomicUsize,
    bytes: AtomicU64,
    stopped: AtomicBool,
}

impl Work<'_> {
    /// Counts one part after another until none is left; the runs it had to write.
    fn run(
        &self,
        table: &mut PieceTable,
        stop: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Vec<Run>, Error> {
        let mut runs = Vec::new();
        while let Some(part) = self.parts.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            for text in part {
                if let Err(error) = self.count(text, table, &mut runs, stop) {
                    self.stopped.store(true, Ordering::Relaxed);
                    return Err(error);
                }
                if self.stopped.load(Ordering::Relaxed) {
                    return Ok(runs);
                }
            }
            if stop(self.bytes.load(Ordering::Relaxed)) {
                self.stopped.store(true, Ordering::Relaxed);
            }
        }
        Ok(runs)
    }

    fn count(
        &self,
        text: &str,
        table: &mut PieceTable,
        runs: &mut Vec<Run>,
        stop: &mut dyn FnMut(u64) -> bool,
    ) -> Result<(), Error> {
        let bytes = text.as_bytes();
        let mut pieces = split(text, self.pattern);
        let mut start = 0;
        let mut reported = 0;
        loop {
            for _ in 0..CHECK_PIECES {
                let Some(end) = pieces.next_end() else {
                    let rest = (text.len() - reported) as u64;
                    self.bytes.fetch_add(rest, Ordering::Relaxed);
                    return self.spill(table, runs);
                };
                table.count(bytes, start, end);
                start = end;
            }
            self.spill(table, runs)?;
            if start - reported > PART_BYTES {
                let done = self
                    .bytes
                    .fetch_add((start - reported) as u64, Ordering::Relaxed);
                reported = start;
                if stop(done) {
                    self.stopped.store(true, Ordering::Relaxed);
                }
            }
            if self.stopped.load(Ordering::Relaxed) {
                return Ok(());
            }
        }
    }

    /// Writes a table that has outgrown its memory to a run.
    fn spill(&self, table: &mut PieceTable, runs: &mut Vec<Run>) -> Result<(), Error> {
        if table.memory() > self.max_memory {
            let full = std::mem::take(table);
            runs.push(Run::write(self.spill_folder, full.sorted().map(Ok))?);
        }
        Ok(())
    }
}

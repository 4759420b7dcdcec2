//! Counts on disk: sorted runs for what does not fit into memory, and the saved state.
//!
//! Both hold entries in strictly ascending order of the pieces: length, bytes, count, the numbers
//! as LEB128. A saved state has a header in front and a checksum behind:
//!
//! ```text
//! "FLEDGECT"  version u32  length u32 + name of the pattern
//! texts u64   bytes u64    entries u64                        (all little-endian)
//! entries
//! checksum u64 of everything before it
//! ```
//!
//! `count` is the only caller. A file is read to its last byte before anything of it counts.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, ErrorKind};

/// A piece and its count.
pub(crate) type Entry = (Box<[u8]>, u64);

const MAGIC: &[u8; 8] = b"FLEDGECT";
const VERSION: u32 = 1;
const BUFFER: usize = 1 << 18;

/// What a saved state says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) pattern: String,
    pub(crate) num_texts: u64,
    pub(crate) num_bytes: u64,
    pub(crate) num_entries: u64,
}

pub(crate) fn io_error(path: &Path, error: &io::Error) -> Error {
    Error::new(ErrorKind::Io, format!("{}: {error}", path.display()))
}

/// A sorted run in a temporary file, which goes away with it.
pub(crate) struct Run {
    path: PathBuf,
}

impl Drop for Run {
    fn drop(&mut self) {
        // Nothing can be done about a file that does not go; the system cleans its folder.
        let _ = fs::remove_file(&self.path);
    }
}

impl Run {
    pub(crate) fn write(
        folder: &Path,
        entries: impl Iterator<Item = Result<Entry, Error>>,
    ) -> Result<Run, Error> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!("fledge-{}-{number}.counts", std::process::id()));
        let file = OpenOptions::new().write(true).create_new(true).open(&path);
        let file = file.map_err(|error| io_error(&path, &error))?;
        let run = Run { path };
        let mut out = Output::new(file);
        for entry in entries {
            let (piece, count) = entry?;
            out.entry(&piece, count)
                .map_err(|error| io_error(&run.path, &error))?;
        }
        out.file
            .flush()
            .map_err(|error| io_error(&run.path, &error))?;
        Ok(run)
    }

    pub(crate) fn read(&self) -> Result<Entries, Error> {
        let file = File::open(&self.path).map_err(|error| io_error(&self.path, &error))?;
        let len = file
            .metadata()
            .map_err(|error| io_error(&self.path, &error))?
            .len();
        Ok(Entries {
            input: Input::new(file, len),
            path: self.path.clone(),
            last: None,
            num_left: None,
        })
    }
}

/// Writes a state to `path`: whole or, if anything fails, not at all.
pub(crate) fn save(
    path: &Path,
    header: &Header,
    entries: impl Iterator<Item = Result<Entry, Error>>,
) -> Result<(), Error> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let result = write_state(&temporary, header, entries)
        .and_then(|()| fs::rename(&temporary, path).map_err(|error| io_error(path, &error)));
    if result.is_err() {
        let _ = fs::remove_file(&temporary); // the first error is the one to tell
    }
    result
}

fn write_state(
    path: &Path,
    header: &Header,
    entries: impl Iterator<Item = Result<Entry, Error>>,
) -> Result<(), Error> {
    let fail = |error| io_error(path, &error);
    let mut out = Output::new(File::create(path).map_err(fail)?);
    let mut num_entries = 0;
    let start = |out: &mut Output, n: u64| {
        out.bytes(MAGIC)?;
        out.bytes(&VERSION.to_le_bytes())?;
        out.bytes(&(header.pattern.len() as u32).to_le_bytes())?;
        out.bytes(header.pattern.as_bytes())?;
        out.bytes(&header.num_texts.to_le_bytes())?;
        out.bytes(&header.num_bytes.to_le_bytes())?;
        out.bytes(&n.to_le_bytes())
    };
    start(&mut out, header.num_entries).map_err(fail)?;
    for entry in entries {
        let (piece, count) = entry?;
        out.entry(&piece, count).map_err(fail)?;
        num_entries += 1;
    }
    assert_eq!(
        num_entries, header.num_entries,
        "the counter counts its own entries"
    );
    let sum = out.sum.value();
    out.bytes(&sum.to_le_bytes()).map_err(fail)?;
    out.file.flush().map_err(fail)?;
    out.file.get_ref().sync_all().map_err(fail)
}

/// Opens a state: its header, and its entries, of which none may be used before all are read.
pub(crate) fn load(path: &Path) -> Result<(Header, Entries), Error> {
    let file = File::open(path).map_err(|error| io_error(path, &error))?;
    let len = file
        .metadata()
        .map_err(|error| io_error(path, &error))?
        .len();
    let mut input = Input::new(file, len);
    let header = read_header(&mut input).map_err(|what| what.at(path))?;
    let entries = Entries {
        num_left: Some(header.num_entries),
        input,
        path: path.to_owned(),
        last: None,
    };
    Ok((header, entries))
}

fn read_header(input: &mut Input) -> Result<Header, Fault> {
    if &input.array::<8>()? != MAGIC {
        return Err(Fault::Bad("it is not a file of piece counts"));
    }
    if u32::from_le_bytes(input.array()?) != VERSION {
        return Err(Fault::Bad("it was written by another version"));
    }
    let len = u32::from_le_bytes(input.array()?);
    let pattern = String::from_utf8(input.vec(len.into())?);
    let mut number = || Ok(u64::from_le_bytes(input.array()?));
    Ok(Header {
        pattern: pattern.map_err(|_| Fault::Bad("its pattern is no text"))?,
        num_texts: number()?,
        num_bytes: number()?,
        num_entries: number()?,
    })
}

/// What is wrong with a file that is being read.
enum Fault {
    Io(io::Error),
    Bad(&'static str),
}

impl Fault {
    fn at(self, path: &Path) -> Error {
        match self {
            Fault::Io(error) => io_error(path, &error),
            Fault::Bad(what) => {
                let message = format!("{}: {what}", path.display());
                Error::new(ErrorKind::CorruptCounts, message)
            }
        }
    }
}

/// The entries of a run or a state, checked as they come.
pub(crate) struct Entries {
    input: Input,
    path: PathBuf,
    last: Option<Box<[u8]>>,
    num_left: Option<u64>, // None: to the end of the file, without a checksum (a run)
}

impl Entries {
    fn read(&mut self) -> Result<Option<Entry>, Fault> {
        match &mut self.num_left {
            None if self.input.left == 0 => return Ok(None),
            None => {}
            Some(0) => {
                let sum = self.input.sum.value();
                if self.input.left != 8 || u64::from_le_bytes(self.input.array()?) != sum {
                    return Err(Fault::Bad("its checksum does not fit: it is damaged"));
                }
                self.num_left = None;
                return Ok(None);
            }
            Some(n) => *n -= 1,
        }
        let len = self.input.number()?;
        let piece = self.input.vec(len)?.into_boxed_slice();
        let count = self.input.number()?;
        if piece.is_empty() || count == 0 || self.last.as_ref().is_some_and(|last| *last >= piece) {
            return Err(Fault::Bad("its entries are out of order: it is damaged"));
        }
        self.last = Some(piece.clone());
        Ok(Some((piece, count)))
    }
}

impl Iterator for Entries {
    type Item = Result<Entry, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        self.read()
            .map_err(|fault| fault.at(&self.path))
            .transpose()
    }
}

/// Entries in the order of their pieces.
pub(crate) type Source<'a> = Box<dyn Iterator<Item = Result<Entry, Error>> + 'a>;

/// The next piece of a source, the number of the source, the count.
type Head = (Box<[u8]>, usize, u64);

/// Entries of several sorted sources as one, counts of equal pieces added up.
pub(crate) struct Merged<'a> {
    sources: Vec<Source<'a>>,
    heads: BinaryHeap<Reverse<Head>>,
}

impl<'a> Merged<'a> {
    pub(crate) fn new(sources: Vec<Source<'a>>) -> Result<Merged<'a>, Error> {
        let mut merged = Merged {
            heads: BinaryHeap::with_capacity(sources.len()),
            sources,
        };
        for source in 0..merged.sources.len() {
            merged.advance(source)?;
        }
        Ok(merged)
    }

    fn advance(&mut self, source: usize) -> Result<(), Error> {
        if let Some((piece, count)) = self.sources[source].next().transpose()? {
            self.heads.push(Reverse((piece, source, count)));
        }
        Ok(())
    }

    fn read(&mut self) -> Result<Option<Entry>, Error> {
        let Some(Reverse((piece, source, mut total))) = self.heads.pop() else {
            return Ok(None);
        };
        self.advance(source)?;
        while self
            .heads
            .peek()
            .is_some_and(|Reverse(head)| head.0 == piece)
        {
            let Some(Reverse((_, source, count))) = self.heads.pop() else {
                unreachable!("it was just looked at")
            };
            total += count;
            self.advance(source)?;
        }
        Ok(Some((piece, total)))
    }
}

impl Iterator for Merged<'_> {
    type Item = Result<Entry, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        self.read().transpose()
    }
}

/// A 64-bit checksum of a stream, eight bytes at a time, whatever the sizes of the writes.
#[derive(Default)]
struct Checksum {
    state: u64,
    word: u64,
    filled: u32,
    len: u64,
}

impl Checksum {
    fn add(&mut self, bytes: &[u8]) {
        self.len += bytes.len() as u64;
        for &byte in bytes {
            self.word |= u64::from(byte) << (8 * self.filled);
            self.filled += 1;
            if self.filled == 8 {
                self.state = Self::mix(self.state, self.word);
                (self.word, self.filled) = (0, 0);
            }
        }
    }

    fn value(&self) -> u64 {
        Self::mix(Self::mix(self.state, self.word), self.len)
    }

    /// A bijection of the state for every word, and of the word for every state, so that no
    /// single changed word goes unnoticed.
    fn mix(state: u64, word: u64) -> u64 {
        let x = (state.rotate_left(29) ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        x ^ x >> 32
    }
}

struct Output {
    file: BufWriter<File>,
    sum: Checksum,
}

impl Output {
    fn new(file: File) -> Output {
        Output {
            file: BufWriter::with_capacity(BUFFER, file),
            sum: Checksum::default(),
        }
    }

    fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.sum.add(bytes);
        self.file.write_all(bytes)
    }

    fn number(&mut self, mut number: u64) -> io::Result<()> {
        while number >= 0x80 {
            self.bytes(&[number as u8 | 0x80])?;
            number >>= 7;
        }
        self.bytes(&[number as u8])
    }

    fn entry(&mut self, piece: &[u8], count: u64) -> io::Result<()> {
        self.number(piece.len() as u64)?;
        self.bytes(piece)?;
        self.number(count)
    }
}

struct Input {
    file: BufReader<File>,
    sum: Checksum,
    left: u64, // bytes of the file not read yet
}

impl Input {
    fn new(file: File, len: u64) -> Input {
        Input {
            file: BufReader::with_capacity(BUFFER, file),
            sum: Checksum::default(),
            left: len,
        }
    }

    /// `len` bytes; a length beyond the end of the file allocates nothing.
    fn vec(&mut self, len: u64) -> Result<Vec<u8>, Fault> {
        if len > self.left {
            return Err(Fault::Bad("it ends too early"));
        }
        let mut bytes = vec![0; len as usize];
        self.file.read_exact(&mut bytes).map_err(Fault::Io)?;
        self.sum.add(&bytes);
        self.left -= len;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        if (N as u64) > self.left {
            return Err(Fault::Bad("it ends too early"));
        }
        let mut bytes = [0; N];
        self.file.read_exact(&mut bytes).map_err(Fault::Io)?;
        self.sum.add(&bytes);
        self.left -= N as u64;
        Ok(bytes)
    }

    fn number(&mut self) -> Result<u64, Fault> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let [byte] = self.array()?;
            let bits = u64::from(byte & 0x7F);
            if bits << shift >> shift != bits {
                break;
            }
            number |= bits << shift;
            if byte < 0x80 {
                return Ok(number);
            }
        }
        Err(Fault::Bad(
            "a number in it has more than 64 bits: it is damaged",
        ))
    }
}

//! A few threads that go through the phases of a step together.
//!
//! A phase is a number of units of work. Whoever is there takes some of those
//! that are left, and the next phase begins when all are *done*, not when all
//! threads have *arrived*: a thread that sleeps holds nobody up, nor does one that
//! the system has put aside, unless it had begun a unit; and a caller without
//! helpers does everything itself. So
//! the results must not depend on who does what. Between steps a helper waits
//! for a moment and then sleeps until it is woken. Used by `step`.

use std::ops::Range;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long a helper looks out for the next step before it sleeps: a step of a small model is
/// shorter than this, and waking takes 10 to 50 microseconds.
const LOOK_OUT: Duration = Duration::from_micros(60);
/// Looks at a counter before a waiting thread offers its processor to others.
const LOOKS: u32 = 2000;

/// Work on units `range` of a phase, with what a thread keeps for itself; `first`: it has not
/// worked on this phase before.
pub(crate) type Work<'a, P> = dyn Fn(usize, Range<usize>, bool, &mut P) + Sync + 'a;

#[repr(align(128))] // lines of the cache that no other phase shares
struct Phase {
    next: AtomicUsize,
    done: AtomicUsize,
    total: usize,
}

impl Phase {
    /// Units that nobody has taken: a share of the rest, smaller towards the end.
    fn take(&self, threads: usize) -> Option<Range<usize>> {
        let mut at = self.next.load(Ordering::Relaxed);
        while at < self.total {
            let count = ((self.total - at) / (2 * threads)).max(1);
            let taken = self.next.compare_exchange_weak(
                at,
                at + count,
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
            match taken {
                Ok(_) => return Some(at..at + count),
                Err(now) => at = now,
            }
        }
        None
    }
}

/// One step. A helper may hold on to it when the step is over: it finds every unit taken then,
/// and so never looks at `work`.
struct Job<P: 'static> {
    phases: Vec<Phase>,
    threads: usize,
    failed: AtomicBool,
    work: *const Work<'static, P>,
}

// SAFETY: `work` points to something `Sync`, and is used only while the caller of `Team::run`
// waits in it (see `take_part`).
unsafe impl<P> Send for Job<P> {}
// SAFETY: as above.
unsafe impl<P> Sync for Job<P> {}

impl<P> Job<P> {
    fn take_part(&self, own: &mut P) {
        for (index, phase) in self.phases.iter().enumerate() {
            let mut first = true;
            while let Some(range) = phase.take(self.threads) {
                let count = range.len();
                // after a panic `own` may be half made: the rest is only counted
                if !self.failed.load(Ordering::Relaxed) {
                    // SAFETY: these units are not done, so the caller of `run` is still in it,
                    // and what it was given is still there.
                    let work = unsafe { &*self.work };
                    let result = catch_unwind(AssertUnwindSafe(|| work(index, range, first, own)));
                    if result.is_err() {
                        self.failed.store(true, Ordering::Relaxed);
                    }
                }
                first = false;
                // what was written comes before the count, and is seen by who sees the count
                phase.done.fetch_add(count, Ordering::Release);
            }
            let mut looks = 0;
            while phase.done.load(Ordering::Acquire) < phase.total {
                looks += 1;
                if looks < LOOKS {
                    std::hint::spin_loop();
                } else {
                    thread::yield_now();
                }
            }
        }
    }
}

struct Shared<P: 'static> {
    job: Mutex<Option<Arc<Job<P>>>>,
    /// Counts the jobs.
    number: AtomicUsize,
    stop: AtomicBool,
    sleeping: Vec<AtomicBool>,
}

/// The caller and its helpers.
pub(crate) struct Team<P: 'static> {
    shared: Arc<Shared<P>>,
    helpers: Vec<(JoinHandle<()>, Thread)>,
    process: u32,
    own: P,
}

impl<P: Default + Send + 'static> Team<P> {
    /// `threads` in all; fewer where the system does not give them.
    pub(crate) fn new(threads: usize) -> Team<P> {
        let count = threads.saturating_sub(1);
        let shared = Arc::new(Shared {
            job: Mutex::new(None),
            number: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            sleeping: (0..count).map(|_| AtomicBool::new(false)).collect(),
        });
        let helpers = (0..count)
            .map_while(|index| {
                let shared = Arc::clone(&shared);
                let name = format!("fledge-decode-{}", index + 1);
                let help = move || help(&shared, index);
                thread::Builder::new().name(name).spawn(help).ok()
            })
            .map(|handle| {
                let thread = handle.thread().clone();
                (handle, thread)
            })
            .collect();
        Team {
            shared,
            helpers,
            process: std::process::id(),
            own: P::default(),
        }
    }

    /// Threads that work: one in a process that was forked off, where no helper came along.
    fn threads(&self) -> usize {
        if std::process::id() == self.process {
            1 + self.helpers.len()
        } else {
            1
        }
    }

    /// Does all units of all phases, phase after phase; false if some of the work panicked.
    pub(crate) fn run(&mut self, totals: impl Iterator<Item = usize>, work: &Work<P>) -> bool {
        let threads = self.threads();
        let phase = |total| Phase {
            next: AtomicUsize::new(0),
            done: AtomicUsize::new(0),
            total,
        };
        let work: *const Work<P> = work;
        let job = Arc::new(Job {
            phases: totals.map(phase).collect(),
            threads,
            failed: AtomicBool::new(false),
            // SAFETY: only the lifetime changes. Nobody uses it after the last unit is done, and
            // this function does not return before that.
            work: unsafe { std::mem::transmute::<*const Work<P>, *const Work<'static, P>>(work) },
        });
        if threads > 1 {
            *self
                .shared
                .job
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&job));
            self.shared.number.fetch_add(1, Ordering::SeqCst);
            self.wake();
        }
        job.take_part(&mut self.own);
        !job.failed.load(Ordering::Relaxed)
    }

    fn wake(&self) {
        for ((_, thread), sleeping) in self.helpers.iter().zip(&self.shared.sleeping) {
            if sleeping.swap(false, Ordering::SeqCst) {
                thread.unpark();
            }
        }
    }
}

impl<P: 'static> Drop for Team<P> {
    fn drop(&mut self) {
        if std::process::id() != self.process {
            // threads that are not here can't be waited for
            std::mem::take(&mut self.helpers)
                .into_iter()
                .for_each(std::mem::forget);
            return;
        }
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.number.fetch_add(1, Ordering::SeqCst);
        for (handle, thread) in self.helpers.drain(..) {
            thread.unpark();
            let _ = handle.join(); // a helper's panic was caught in its work
        }
    }
}

/// The life of a helper.
fn help<P: Default>(shared: &Shared<P>, index: usize) {
    let mut own = P::default();
    let mut seen = 0;
    loop {
        seen = wait_for_another(shared, index, seen);
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        let job = shared
            .job
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if let Some(job) = job {
            job.take_part(&mut own);
        }
    }
}

/// The number of the newest job, once it is another than `seen`.
fn wait_for_another<P>(shared: &Shared<P>, index: usize, seen: usize) -> usize {
    let began = Instant::now();
    loop {
        for _ in 0..64 {
            let number = shared.number.load(Ordering::SeqCst);
            if number != seen {
                return number;
            }
            std::hint::spin_loop();
        }
        if began.elapsed() > LOOK_OUT {
            break;
        }
    }
    loop {
        shared.sleeping[index].store(true, Ordering::SeqCst);
        // whoever counts up after this look sees that a thread sleeps, and wakes it
        let number = shared.number.load(Ordering::SeqCst);
        if number != seen {
            shared.sleeping[index].store(false, Ordering::SeqCst);
            return number;
        }
        thread::park();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_is_done_once_and_phases_follow_each_other() {
        for threads in [1, 2, 5] {
            let mut team: Team<usize> = Team::new(threads);
            for round in 0..200 {
                let totals = [7, 1, 0, 40, 3];
                let counts: Vec<Vec<AtomicUsize>> = totals
                    .iter()
                    .map(|&n| (0..n).map(|_| AtomicUsize::new(0)).collect())
                    .collect();
                let fine = team.run(totals.into_iter(), &|phase, range, _, own| {
                    *own += range.len();
                    for before in counts.iter().take(phase).flatten() {
                        assert_eq!(before.load(Ordering::SeqCst), 1);
                    }
                    for unit in range {
                        counts[phase][unit].fetch_add(1, Ordering::SeqCst);
                    }
                });
                assert!(fine, "round {round}");
                assert!(counts
                    .iter()
                    .flatten()
                    .all(|n| n.load(Ordering::SeqCst) == 1));
                if round % 50 == 0 {
                    thread::sleep(3 * LOOK_OUT); // the helpers fall asleep
                }
            }
        }
    }

    #[test]
    fn a_panic_in_the_work_ends_the_step_and_not_the_team() {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| ()));
        let mut team: Team<()> = Team::new(3);
        let bad = team.run([9, 9].into_iter(), &|phase, range, _, ()| {
            assert!(phase == 1 || !range.contains(&4));
        });
        std::panic::set_hook(hook);
        assert!(!bad);
        assert!(team.run([9].into_iter(), &|_, _, _, ()| ()));
    }
}

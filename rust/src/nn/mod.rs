//! One decode step of a qwen3 model in one call, on a CPU.
//!
//! A step of a small model is bound by calls when a framework makes it of
//! hundreds of operators. Here it is one call: the threads of a small team go
//! through the phases of all layers together and read every weight once, in
//! the order of memory. `simd` is what differs between processors, `kernels`
//! the arithmetic, `pack` the weights in the order in which they are read,
//! `team` the threads, `plan` checks what is asked and cuts the attention into
//! tasks, `step` the phases. `draw` picks tokens of the logits.
//! Nothing here knows Python, requests or scheduling.

mod draw;
mod kernels;
mod pack;
mod plan;
mod simd;
mod step;
mod team;

pub use draw::{draw, logprob, Rule};
pub use pack::{Format, LayerWeights, Shape, Weights};
pub use plan::{Cache, Part, Row};
pub use simd::Level;
pub use step::Stepper;

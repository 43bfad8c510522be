//! Bytes from one socket to another by way of a pipe, without being copied into this process.
//!
//! Only where neither side has TLS nor a tunnel, and only for bulk: a pipe costs two system calls for each piece where
//! copying costs as many, and pays off by what it does not copy. A direction begins by copying; it changes when a lot
//! has come in large pieces, and back when a piece is small. While a direction waits it holds no pipe.

use std::{
    cell::RefCell,
    io,
    os::fd::OwnedFd,
    rc::Rc,
    task::{Context, Poll, ready},
};

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use tokio::{io::Interest, net::TcpStream};

use super::Moved;

/// Bytes that a direction copies before it uses a pipe.
const BULK: usize = 256 * 1024;
/// A piece below this is none of a bulk transfer.
const SMALL: usize = 16 * 1024;
/// Size of a pipe. A segment takes a page of it whatever its size, and 64 of these are all that an unprivileged user
/// may have of this size; beyond that the kernel leaves them smaller.
const PIPE: usize = 256 * 1024;
/// Pipes of a worker, in use or kept; directions that get none go on copying.
const MAX_PIPES: usize = 32;

/// The pipes of a worker.
#[derive(Default)]
pub(crate) struct Pipes(RefCell<Kept>);

#[derive(Default)]
struct Kept {
    idle: Vec<(OwnedFd, OwnedFd)>,
    open: usize,
}

impl Pipes {
    fn take(self: &Rc<Self>) -> Option<Pipe> {
        let mut kept = self.0.borrow_mut();
        let ends = match kept.idle.pop() {
            Some(ends) => ends,
            None if kept.open < MAX_PIPES => {
                let ends = pipe_with(PipeFlags::NONBLOCK | PipeFlags::CLOEXEC).ok()?;
                // A smaller one works as well.
                let _ = fcntl_setpipe_size(&ends.1, PIPE);
                kept.open += 1;
                ends
            }
            None => return None,
        };
        Some(Pipe { ends: Some(ends), held: 0, home: Rc::clone(self) })
    }

    /// Closes half of the pipes that nobody uses, so that a burst does not stay open.
    pub(crate) fn sweep(&self) {
        let mut kept = self.0.borrow_mut();
        let half = kept.idle.len() / 2;
        kept.open -= kept.idle.len() - half;
        kept.idle.truncate(half);
    }
}

/// A pipe in use.
struct Pipe {
    /// Reading and writing end; there until it is dropped.
    ends: Option<(OwnedFd, OwnedFd)>,
    /// Bytes inside.
    held: usize,
    home: Rc<Pipes>,
}

impl Drop for Pipe {
    fn drop(&mut self) {
        let mut kept = self.home.0.borrow_mut();
        match self.ends.take() {
            // Another connection must not get what this one left.
            Some(ends) if self.held == 0 => kept.idle.push(ends),
            _ => kept.open -= 1,
        }
    }
}

/// Whether and how a direction is spliced.
#[derive(Default)]
pub(super) struct Splice {
    /// Bytes that came in large pieces in a row.
    run: usize,
    pipe: Option<Pipe>,
    /// The sockets cannot be spliced.
    never: bool,
}

/// What a direction is to do next.
pub(super) enum Next {
    /// Copy.
    Copy,
    /// The reader has ended, and everything of it was written.
    End,
}

impl Splice {
    /// Takes note of a piece that was copied before the reader had to wait, or that filled the buffer.
    pub(super) fn copied(&mut self, n: usize) {
        self.run = if n < SMALL { 0 } else { self.run.saturating_add(n) };
    }

    /// Whether there is enough in a row for a pipe.
    pub(super) fn is_due(&self) -> bool {
        (self.run >= BULK && !self.never) || self.pipe.is_some()
    }

    /// Moves bytes until one side must wait.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        pipes: &Rc<Pipes>,
        from: &TcpStream,
        to: &TcpStream,
        moved: &Moved,
    ) -> Poll<io::Result<Next>> {
        if self.pipe.is_none() {
            // Whoever waits for a reader waits without a pipe.
            ready!(from.poll_read_ready(cx))?;
            self.pipe = pipes.take();
        }
        let Some(pipe) = self.pipe.as_mut() else {
            self.run = 0;
            return Poll::Ready(Ok(Next::Copy));
        };
        let Some((out, into)) = pipe.ends.as_ref() else { return Poll::Ready(Ok(Next::Copy)) };
        let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
        // What this call has read so far: little of it ends the bulk.
        let mut got = 0;
        loop {
            while pipe.held > 0 {
                ready!(to.poll_write_ready(cx))?;
                let wrote = to.try_io(Interest::WRITABLE, || {
                    splice(out, None, to, None, pipe.held, flags).map_err(io::Error::from)
                });
                match wrote {
                    Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                    Ok(n) => {
                        pipe.held -= n;
                        moved.add(n as u64);
                    }
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    Err(e) => return Poll::Ready(Err(e)),
                }
            }
            if from.poll_read_ready(cx)?.is_pending() {
                self.pipe = None;
                if got > 0 && got < SMALL {
                    self.run = 0;
                }
                return Poll::Pending;
            }
            let read = from.try_io(Interest::READABLE, || {
                splice(from, None, into, None, PIPE, flags).map_err(io::Error::from)
            });
            match read {
                Ok(0) => {
                    self.pipe = None;
                    return Poll::Ready(Ok(Next::End));
                }
                Ok(n) => {
                    pipe.held += n;
                    got += n;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) if e.kind() == io::ErrorKind::InvalidInput => {
                    self.pipe = None;
                    self.never = true;
                    return Poll::Ready(Ok(Next::Copy));
                }
                Err(e) => return Poll::Ready(Err(e)),
            }
        }
    }
}

//! Tells connections to drain or end, without a lock on their path.
//!
//! A `CancellationToken` locks its list of waiters whenever a waiting task is polled, and a chain's token is
//! shared by all workers. So each worker has one task that waits for a chain's tokens, and its connections look
//! at a flag of their own thread.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    rc::Rc,
    task::{Context, Poll, Waker},
};

use crate::config::listener::Chain;

/// A chain's signals on one worker.
#[derive(Default)]
pub(crate) struct Signals {
    drain: Cell<bool>,
    kill: Cell<bool>,
    waiters: RefCell<Waiters>,
}

#[derive(Default)]
struct Waiters {
    wakers: Vec<Option<Waker>>,
    free: Vec<usize>,
}

/// One task's place among those to be woken.
pub(crate) struct Subscription {
    signals: Rc<Signals>,
    place: usize,
}

impl Signals {
    /// Waits for the chain's tokens; ends with the second one.
    pub(crate) async fn follow(self: Rc<Self>, chain: std::sync::Arc<Chain>) {
        tokio::select! {
            () = chain.drain.cancelled() => {}
            () = chain.kill.cancelled() => {}
        }
        self.drain.set(true);
        self.wake();
        chain.kill.cancelled().await;
        self.kill.set(true);
        self.wake();
    }

    fn wake(&self) {
        for w in self.waiters.borrow().wakers.iter().flatten() {
            w.wake_by_ref();
        }
    }

    pub(crate) fn subscribe(self: &Rc<Self>) -> Subscription {
        let mut w = self.waiters.borrow_mut();
        let place = w.free.pop().unwrap_or_else(|| {
            w.wakers.push(None);
            w.wakers.len() - 1
        });
        Subscription { signals: Rc::clone(self), place }
    }

    /// Whether connections should end when they can.
    pub(crate) fn is_draining(&self) -> bool {
        self.drain.get()
    }
}

impl Subscription {
    fn poll(&self, flag: &Cell<bool>, cx: &mut Context<'_>) -> Poll<()> {
        if flag.get() {
            return Poll::Ready(());
        }
        if let Some(slot) = self.signals.waiters.borrow_mut().wakers.get_mut(self.place)
            && !slot.as_ref().is_some_and(|w| w.will_wake(cx.waker()))
        {
            *slot = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.signals.is_draining()
    }

    /// Ready when connections should end when they can.
    pub(crate) fn poll_drained(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.poll(&self.signals.drain, cx)
    }

    /// Waits until connections should end when they can.
    pub(crate) async fn drained(&self) {
        poll_fn(|cx| self.poll_drained(cx)).await;
    }

    /// Waits until connections must end.
    pub(crate) async fn killed(&self) {
        poll_fn(|cx| self.poll(&self.signals.kill, cx)).await;
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut w = self.signals.waiters.borrow_mut();
        if let Some(slot) = w.wakers.get_mut(self.place) {
            *slot = None;
        }
        w.free.push(self.place);
    }
}

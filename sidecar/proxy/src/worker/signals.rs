//! Tells connections to drain or end, without a lock on their path.
//!
//! A `CancellationToken` locks its list of waiters whenever a waiting task is polled, and a chain's token is
//! shared by all workers. So each worker has one task that waits for a chain's tokens, and its connections look
//! at a flag of their own thread.
//!
//! Connections that come through one of this cluster's own gateways share signals of their own, which also say when
//! that gateway drains. A gateway that is back gets connections that stay, with the same signals: those from before
//! have been told, and end with the gateway's process if not before.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    future::poll_fn,
    net::IpAddr,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use tokio::sync::watch;

use crate::config::listener::Chain;

/// This cluster's own gateways, and whether they drain.
pub(crate) type Sources = BTreeMap<IpAddr, bool>;

/// A chain's signals on one worker, for connections of a gateway or for all others.
#[derive(Default)]
pub(crate) struct Signals {
    /// For connections of one gateway.
    from: Option<IpAddr>,
    drain: Cell<bool>,
    kill: Cell<bool>,
    waiters: RefCell<Waiters>,
}

#[derive(Default)]
struct Waiters {
    wakers: Vec<Option<Waker>>,
    free: Vec<usize>,
}

fn drains(sources: &Sources, ip: IpAddr) -> bool {
    sources.get(&ip).copied().unwrap_or_default()
}

/// One task's place among those to be woken.
pub(crate) struct Subscription {
    signals: Rc<Signals>,
    place: usize,
}

impl Signals {
    /// Signals for connections of a gateway, which may drain already.
    pub(crate) fn of_gateway(ip: IpAddr, sources: &Sources) -> Self {
        Self { from: Some(ip), drain: Cell::new(drains(sources, ip)), ..Self::default() }
    }

    /// Whether they are for connections of a gateway.
    pub(crate) fn are_of_gateway(&self) -> bool {
        self.from.is_some()
    }

    /// Waits for the chain's tokens, and for what becomes of the gateway; ends with the second token.
    pub(crate) async fn follow(self: Rc<Self>, chain: Arc<Chain>, sources: watch::Receiver<Arc<Sources>>) {
        tokio::select! {
            () = chain.drain.cancelled() => {}
            () = chain.kill.cancelled() => {}
            () = self.follow_gateway(sources) => {}
        }
        self.drain.set(true);
        self.wake();
        chain.kill.cancelled().await;
        self.kill.set(true);
        self.wake();
    }

    async fn follow_gateway(&self, mut sources: watch::Receiver<Arc<Sources>>) {
        if let Some(ip) = self.from {
            while sources.wait_for(|s| drains(s, ip) != self.drain.get()).await.is_ok() {
                self.drain.set(!self.drain.get());
                if self.drain.get() {
                    self.wake();
                }
            }
        }
        std::future::pending().await
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

//! Timers that outlive the request that needed them.
//!
//! Nearly every timeout is set and never fires. Registering one with the runtime, and removing it again, takes a
//! lock twice; so a timer is handed on from request to request as it is. One that is registered for an earlier time
//! than its new owner needs just fires early, once, and is then moved.

use std::{
    cell::RefCell,
    future::Future as _,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use tokio::time::{Instant, Sleep, sleep_until};

/// Timers kept for later; more than this at once are a burst that need not be remembered.
const KEPT: usize = 4096;

/// The timers of a worker.
#[derive(Default)]
pub(crate) struct Alarms(RefCell<Vec<Pin<Box<Sleep>>>>);

impl Alarms {
    /// An alarm for whatever comes; it costs nothing until it is first polled.
    pub(crate) fn alarm(self: &Rc<Self>) -> Alarm {
        Alarm { alarms: Rc::clone(self), sleep: None }
    }

    /// Forgets half of the timers that nobody holds, so that a burst does not stay in memory.
    pub(crate) fn sweep(&self) {
        let mut kept = self.0.borrow_mut();
        let half = kept.len() / 2;
        kept.truncate(half);
        kept.shrink_to(2 * half);
    }
}

/// One timer in use.
pub(crate) struct Alarm {
    alarms: Rc<Alarms>,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Alarm {
    /// Ready when `at` has come. Each call may name another time.
    pub(crate) fn poll(&mut self, at: Instant, cx: &mut Context<'_>) -> Poll<()> {
        let sleep = self.sleep.get_or_insert_with(|| {
            let kept = self.alarms.0.borrow_mut().pop();
            kept.unwrap_or_else(|| Box::pin(sleep_until(at)))
        });
        if sleep.deadline() > at {
            sleep.as_mut().reset(at);
        }
        loop {
            ready!(sleep.as_mut().poll(cx));
            if sleep.deadline() >= at {
                return Poll::Ready(());
            }
            sleep.as_mut().reset(at);
        }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        let Some(sleep) = self.sleep.take() else { return };
        let mut kept = self.alarms.0.borrow_mut();
        if kept.len() < KEPT {
            kept.push(sleep);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_timer_that_is_handed_on_fires_when_its_new_owner_asked() {
        let alarms = Rc::new(Alarms::default());
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        // Polled once, so that it is registered for the earlier time.
        let mut first = alarms.alarm();
        assert!(std::future::poll_fn(|cx| Poll::Ready(first.poll(at(20), cx))).await.is_pending());
        drop(first);
        let mut second = alarms.alarm();
        std::future::poll_fn(|cx| second.poll(at(60), cx)).await;
        assert!(Instant::now() >= at(60) && alarms.0.borrow().is_empty());
        // It has fired; and then it is registered for a later time than the next owner wants.
        drop(second);
        let mut third = alarms.alarm();
        std::future::poll_fn(|cx| third.poll(at(80), cx)).await;
        assert!(Instant::now() >= at(80));
        assert!(std::future::poll_fn(|cx| Poll::Ready(third.poll(at(600_000), cx))).await.is_pending());
        std::future::poll_fn(|cx| third.poll(at(100), cx)).await;
        assert!(Instant::now() >= at(100) && start.elapsed() < Duration::from_secs(300));
    }
}

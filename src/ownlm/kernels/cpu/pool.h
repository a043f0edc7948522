// A team of threads that runs one function together and meets at barriers in it. Between calls they watch for work for a
// moment and then sleep; at a barrier they spin, and give up their turn when it takes long (the machine is shared).
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace ownlm {

// Members that share a core wait for each other's turn: after some microseconds a wait gives its own turn up, again and again.
inline void pause_briefly(int turn) {
    if (turn > 512 && turn % 32 == 0) {
        std::this_thread::yield();
        return;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Pool {
  public:
    explicit Pool(int size) : size_(std::max(1, size)) {
        for (int id = 1; id < size_; id++) threads_.emplace_back([this, id] { serve(id); });
    }
    ~Pool() {
        {
            std::lock_guard lock(mutex_);
            closing_ = true, call_++;
        }
        wake_.notify_all();
        for (auto& thread : threads_) thread.join();
    }
    Pool(const Pool&) = delete;

    int size() const { return size_; }

    // Run work(0) here and work(1 …) on the other threads; returns when all have.
    void run(const std::function<void(int)>& work) {
        work_ = &work;
        reset();
        if (size_ > 1) {
            running_.store(size_ - 1, std::memory_order_relaxed);
            {
                std::lock_guard lock(mutex_);
                call_.fetch_add(1, std::memory_order_release);
            }
            wake_.notify_all();
        }
        work(0);
        for (int turn = 0; running_.load(std::memory_order_acquire) > 0; turn++) pause_briefly(turn);
    }

    void barrier() {
        if (size_ == 1) return;
        const int round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
        } else {
            for (int turn = 0; round_.load(std::memory_order_acquire) == round; turn++) pause_briefly(turn);
        }
    }

    // Where the next unclaimed piece begins; `phase` tells one shared loop from the next.
    int claim(int phase, int count) { return next_[phase % 4].at.fetch_add(count, std::memory_order_relaxed); }
    void reset(int phase) { next_[phase % 4].at.store(0, std::memory_order_relaxed); }
    void reset() {
        for (int phase = 0; phase < 4; phase++) reset(phase);
    }

  private:
    void serve(int id) {
        for (int seen = 0;;) {
            const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(200);
            int turn = 0;
            while (call_.load(std::memory_order_acquire) == seen) {
                pause_briefly(turn++);
                if (turn % 64 == 0 && std::chrono::steady_clock::now() > until) {
                    std::unique_lock lock(mutex_);
                    wake_.wait(lock, [&] { return call_.load(std::memory_order_acquire) != seen; });
                }
            }
            seen = call_.load(std::memory_order_acquire);
            if (closing_) return;
            (*work_)(id);
            running_.fetch_sub(1, std::memory_order_release);
        }
    }

    struct alignas(64) Counter { std::atomic<int> at{0}; };

    const int size_;
    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable wake_;
    const std::function<void(int)>* work_ = nullptr;
    bool closing_ = false;
    alignas(64) std::atomic<int> call_{0};
    alignas(64) std::atomic<int> running_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> round_{0};
    Counter next_[4];
};

// What one thread of the team does in a step. All members call the same loops in the same order.
class Member {
  public:
    Member(Pool& pool, int id) : id(id), pool_(pool) {}

    const int id;

    // f(begin, end) on an equal share each.
    template <class F>
    void split(int total, const F& f) {
        const int begin = int(int64_t(total) * id / pool_.size()), end = int(int64_t(total) * (id + 1) / pool_.size());
        if (begin < end) f(begin, end);
        pool_.barrier();
    }

    // f(begin, end) on pieces of `piece`, whoever is free takes the next.
    template <class F>
    void share(int total, int piece, const F& f) {
        share_and_go_on(total, piece, f);
        pool_.barrier();
    }

    // The same without waiting for the others. Another shared loop must follow, which does.
    template <class F>
    void share_and_go_on(int total, int piece, const F& f) {
        for (int begin; (begin = pool_.claim(phase_, piece)) < total;) f(begin, std::min(total, begin + piece));
        if (id == 0) pool_.reset(phase_ + 2);  // nobody is there yet: a barrier comes first; and all have left the loop two before this
        phase_++;
    }

    // f() on one thread.
    template <class F>
    void once(const F& f) {
        if (id == 0) f();
        pool_.barrier();
    }

    int threads() const { return pool_.size(); }

  private:
    Pool& pool_;
    int phase_ = 0;
};

}  // namespace ownlm

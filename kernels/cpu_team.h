// Threads that compute one step together.
#pragma once

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

#include "cpu_vectors.h"

// There is one team, whatever file asks for it: its class has external linkage. Its threads are made when they are first
// wanted, live as long as the process, and sleep between steps. Within a step one that is done waits for the others up
// to a hundred times. It spins for some 25 microseconds, for waking takes as long; then it sleeps, so that a core on
// which something else has to run is free. It does not spin at all if this process may use fewer cores than there are
// threads: then the others wait for its own.
class Team {
   public:
    static Team& of_this_process() {  // a fork has none of its parent's threads
        static std::mutex one;
        static Team* team = nullptr;
        static pid_t owner = 0;
        std::lock_guard<std::mutex> lock(one);
        if (owner != getpid()) team = new Team, owner = getpid();  // never deleted: its threads wait for ever
        return *team;
    }

    // Call work(member) for each member below `count`, member 0 on this thread.
    void run(int count, const std::function<void(int)>& work) {
        std::lock_guard<std::mutex> turn(callers);
        while (threads < count - 1) std::thread(&Team::serve, this, ++threads).detach();
        {
            std::lock_guard<std::mutex> lock(mutex);
            size = count, job = &work, arrived = 0;
            spins = count <= (int)std::thread::hardware_concurrency() ? 1000 : 0;
            if (size > 1) round++;
        }
        if (size > 1) changed.notify_all();
        work(0);
        meet();
    }

    // Wait until every member of this run has come here.
    void meet() {
        if (size == 1) return;
        unsigned now = phase;
        if (++arrived == size) {
            arrived = 0;
            {
                std::lock_guard<std::mutex> lock(mutex);
                phase++;
            }
            changed.notify_all();
            return;
        }
        for (int i = 0; i < spins; i++) {
            if (phase != now) return;
            pause();
        }
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait(lock, [&] { return phase != now; });
    }

    int size = 1;

   private:
    void serve(int member) {
        unsigned seen = 0;
        while (true) {
            const std::function<void(int)>* mine;
            {
                std::unique_lock<std::mutex> lock(mutex);
                changed.wait(lock, [&] { return round != seen; });
                seen = round, mine = member < size ? job : nullptr;
            }
            if (!mine) continue;
            (*mine)(member);
            meet();
        }
    }

    static void pause() {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#endif
    }

    std::mutex callers, mutex;
    std::condition_variable changed;
    std::atomic<unsigned> phase{0};
    std::atomic<int> arrived{0};
    unsigned round = 0;
    const std::function<void(int)>* job = nullptr;
    int threads = 0, spins = 0;
};

namespace {

// Run work(i) for each i below count on so many threads, each taking the next when it is done with one.
template <class Work>
void share(i64 count, i64 threads, Work work) {
    std::atomic<i64> next{0};
    Team::of_this_process().run((int)std::max<i64>(1, std::min(count, threads)), [&](int) {
        for (i64 i; (i = next++) < count;) work(i);
    });
}

// The part of [0, count) that is a member's, in whole multiples of `step` but for the last.
struct Part {
    i64 first, last;
};
inline Part part_of(i64 count, i64 step, int member, int size) {
    i64 steps = (count + step - 1) / step;
    return {steps * member / size * step, std::min(count, steps * (member + 1) / size * step)};
}

}  // namespace

#pragma once

// Packed pixels to normalised channels-last values, a vector of pixels at a time. Colours are computed in units of a
// byte: the same as in [0, 1], with fewer roundings.

#include "augment_tasks.h"
#include "simd.h"

namespace fastcifar {
namespace augment {
namespace FASTCIFAR_ISA {
namespace {

using namespace fastcifar::FASTCIFAR_ISA;
using Index = std::int64_t;

constexpr int kLanes = Vec::lanes;
constexpr Index kPixelsPerFlush = 64 * kLanes;  // float32 sums go to float64 after so many pixels
static_assert(kPixelAlign % kLanes == 0, "the pixels' padding must fill a vector");

template <bool kReversed>
FASTCIFAR_INLINE void pack_run(const std::uint8_t* from, Index length, std::uint32_t* to) {
  if (length < kLanes) {
    for (Index i = 0; i < length; ++i) to[kReversed ? length - 1 - i : i] = packed_pixel(from + 3 * i);
    return;
  }
  // The last vector overlaps the one before it.
  for (Index i = 0; i < length; i += kLanes) {
    const Index start = i + kLanes <= length ? i : length - kLanes;
    pack_pixels<kReversed>(from + 3 * start, to + (kReversed ? length - kLanes - start : start));
  }
}

void pack(const Crop& crop) {
  for (Index y = 0; y < crop.height; ++y) {
    std::uint32_t* to = crop.pixels + y * crop.width;
    if (crop.border || crop.rows[y] < 0) {
      for (Index x = 0; x < crop.width; ++x) to[x] = 0;
    }
    if (crop.rows[y] < 0) continue;
    const std::uint8_t* row = crop.image + crop.rows[y] * crop.width * 3;
    for (Index i = 0; i < crop.run_count; ++i) {
      const Run run = crop.runs[i];
      if (run.reversed) {
        pack_run<true>(row + 3 * run.from, run.length, to + run.to);
      } else {
        pack_run<false>(row + 3 * run.from, run.length, to + run.to);
      }
    }
  }
}

struct Colours {
  Vec red, green, blue;
};

template <class F>
FASTCIFAR_INLINE Colours each(Colours v, F&& f) {
  return {f(v.red), f(v.green), f(v.blue)};
}

FASTCIFAR_INLINE Colours load_colours(const std::uint32_t* pixels) {
  return {load_byte(pixels, 0), load_byte(pixels, 1), load_byte(pixels, 2)};
}

FASTCIFAR_INLINE Vec grey(Colours v) {
  return fma(v.red, set(0.2989f), fma(v.green, set(0.587f), v.blue * set(0.114f)));
}

FASTCIFAR_INLINE Vec clamp(Vec v) { return min(max(v, zero()), set(255.0f)); }

FASTCIFAR_INLINE Colours brightened(const std::uint32_t* pixels, Vec brightness) {
  return each(load_colours(pixels),
              [&](Vec v) FASTCIFAR_LAMBDA_INLINE { return min(v * brightness, set(255.0f)); });
}

// Of the brightened picture; the padding's zeros add nothing.
FASTCIFAR_INLINE float mean_grey(const Picture& picture, Index pixels) {
  const Vec brightness = set(picture.brightness);
  double total = 0.0;
  for (Index begin = 0; begin < pixels; begin += kPixelsPerFlush) {
    const Index end = pixels - begin < kPixelsPerFlush ? pixels : begin + kPixelsPerFlush;
    Vec sum = zero();
    for (Index i = begin; i < end; i += kLanes) sum = sum + grey(brightened(picture.pixels + i, brightness));
    float lanes[kLanes];
    store(lanes, sum);
    for (int lane = 0; lane < kLanes; ++lane) total += double(lanes[lane]);
  }
  return float(total / double(pixels));
}

// A picture's normalised colours, a vector of pixels at a time.
template <bool kJitter>
struct Source {
  const std::uint32_t* pixels;
  bool cutout;
  Colours scale, shift;
  Vec brightness, contrast, level, saturation, desaturation;

  FASTCIFAR_INLINE Source(const Task& task, const Picture& picture)
      : pixels(picture.pixels), cutout(task.cutout),
        scale{set(task.scale[0]), set(task.scale[1]), set(task.scale[2])},
        shift{set(task.shift[0]), set(task.shift[1]), set(task.shift[2])} {
    if constexpr (kJitter) {
      brightness = set(picture.brightness);
      contrast = set(picture.contrast);
      level = set(mean_grey(picture, task.pixels) * (1.0f - picture.contrast));
      saturation = set(picture.saturation);
      desaturation = set(1.0f - picture.saturation);
    }
  }

  FASTCIFAR_INLINE Colours at(Index i) const {
    Colours v;
    if constexpr (kJitter) {
      v = each(brightened(pixels + i, brightness),
               [&](Vec c) FASTCIFAR_LAMBDA_INLINE { return clamp(fma(c, contrast, level)); });
      const Vec faded = grey(v) * desaturation;
      v = each(v, [&](Vec c) FASTCIFAR_LAMBDA_INLINE { return clamp(fma(c, saturation, faded)); });
    } else {
      v = load_colours(pixels + i);
    }
    v = {fma(v.red, scale.red, shift.red), fma(v.green, scale.green, shift.green),
         fma(v.blue, scale.blue, shift.blue)};
    if (cutout) {
      const Mask cut = load_flag(pixels + i, kCut);
      v = each(v, [&](Vec c) FASTCIFAR_LAMBDA_INLINE { return select(cut, zero(), c); });
    }
    return v;
  }
};

// f(first pixel) gives the colours of each vector; the last one may be cut.
template <class T, class F>
FASTCIFAR_INLINE void write(const Task& task, F&& f) {
  T* out = static_cast<T*>(task.out);
  for (Index i = 0; i < task.pixels; i += kLanes, out += 3 * kLanes) {
    const Colours v = f(i);
    const Index left = 3 * (task.pixels - i);
    T cut[3 * kLanes];
    T* to = left < 3 * kLanes ? cut : out;
    store(to, interleaved<0>(v.red, v.green, v.blue));
    store(to + kLanes, interleaved<1>(v.red, v.green, v.blue));
    store(to + 2 * kLanes, interleaved<2>(v.red, v.green, v.blue));
    if (to == cut) {
      for (Index k = 0; k < left; ++k) out[k] = cut[k];
    }
  }
}

template <class T, bool kJitter>
void render_range(const Task& task) {
  const Source<kJitter> own(task, task.own);
  if (task.mixing == Mixing::none) {
    write<T>(task, [&](Index i) FASTCIFAR_LAMBDA_INLINE { return own.at(i); });
    return;
  }
  const Source<kJitter> partner(task, task.partner);
  if (task.mixing == Mixing::cutmix) {
    write<T>(task, [&](Index i) FASTCIFAR_LAMBDA_INLINE {
      const Mask pasted = load_flag(own.pixels + i, kPasted);
      Colours a = own.at(i);
      if (any(pasted)) {
        const Colours b = partner.at(i);
        a = {select(pasted, b.red, a.red), select(pasted, b.green, a.green), select(pasted, b.blue, a.blue)};
      }
      return a;
    });
    return;
  }
  // From the nearer of the two, as torch.lerp does.
  const bool nearer = task.share < 0.5f;
  const Vec step = set(nearer ? task.share : task.share - 1.0f);
  write<T>(task, [&](Index i) FASTCIFAR_LAMBDA_INLINE {
    const Colours a = own.at(i), b = partner.at(i), base = nearer ? a : b;
    return Colours{fma(step, b.red - a.red, base.red), fma(step, b.green - a.green, base.green),
                   fma(step, b.blue - a.blue, base.blue)};
  });
}

template <class T>
void render(const Task& task) {
  return task.jitter ? render_range<T, true>(task) : render_range<T, false>(task);
}

}  // namespace
}  // namespace FASTCIFAR_ISA
}  // namespace augment
}  // namespace fastcifar

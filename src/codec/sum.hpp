// SPDX-License-Identifier: Apache-2.0
// SUM of specification section 5: the order of additions that every target follows.
#pragma once

namespace kvarn::codec {

template <class Term>
float sum(int n, Term term) {
  float s[32];
  for (int l = 0; l < 32; ++l) {
    s[l] = l < n ? term(l) : 0.0f;
    for (int i = l + 32; i < n; i += 32) s[l] = s[l] + term(i);
  }
  for (int o = 16; o >= 1; o /= 2)
    for (int l = 0; l < o; ++l) s[l] = s[l] + s[l + o];
  return s[0];
}

}  // namespace kvarn::codec

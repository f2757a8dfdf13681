// Every instruction set gives the same bits: this program runs itself once for each and compares the digests.
#include <unistd.h>

#include "op_calls.h"

namespace cacovid::test {
namespace {

const char* self = nullptr;

void print_digests() {
  std::printf("%s\n", cpu::isa_name());
  repeat(3000,
         [](Random& random) { std::printf("%016llx\n", static_cast<unsigned long long>(random_call(random)(2))); });
}

// First line: the instruction set; then a digest for every call.
std::vector<std::string> digests_of(const char* isa) {
  setenv("CACOVID_CPU_ISA", isa, 1);
  std::vector<std::string> lines;
  FILE* output = popen((std::string("'") + self + "' --digests").c_str(), "r");
  char line[64];
  while (output != nullptr && std::fgets(line, sizeof line, output) != nullptr) lines.push_back(line);
  CHECK(output != nullptr && pclose(output) == 0);
  return lines;
}

TEST(variants_agree_on_every_bit) {
  const std::vector<std::string> baseline = digests_of("baseline");
  CHECK(baseline.size() > 100);
  CHECK(baseline.at(0) == "baseline\n");
  for (const char* isa : {"avx2", "avx512"}) {
    const std::vector<std::string> lines = digests_of(isa);
    CHECK_EQ(lines.size(), baseline.size());
    for (size_t i = 1; i < std::min(lines.size(), baseline.size()); ++i) {
      current_seed = i;
      CHECK(lines[i] == baseline[i]);
    }
  }
}

}  // namespace
}  // namespace cacovid::test

int main(int argc, char** argv) {
  cacovid::test::self = argv[0];
  if (argc == 2 && std::strcmp(argv[1], "--digests") == 0) {
    cacovid::test::print_digests();
    return cacovid::test::tally().failures == 0 ? 0 : 1;
  }
  return cacovid::test::run_tests(argc, argv);
}

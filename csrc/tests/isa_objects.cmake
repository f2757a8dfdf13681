# An AVX object must define nothing that the linker may merge with another object's: the one copy that survives
# could be the one that the running CPU cannot execute.
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} ${object} OUTPUT_VARIABLE symbols RESULT_VARIABLE failed)
  string(REGEX MATCHALL "[^\n]* [VWu] [^\n]*" shared "${symbols}")
  list(FILTER shared EXCLUDE REGEX "DW\\.ref\\.__gxx_personality_v0")
  if(failed OR NOT symbols MATCHES "_loops" OR shared)
    message(FATAL_ERROR "${object} shares ${shared}")
  endif()
endforeach()

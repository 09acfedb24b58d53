# Headers, CMake package and pkg-config files, for programs in C and C++ (docs/cpp.md). All paths in them are relative to
# the files themselves, so that an installed tree can be moved.
include(CMakePackageConfigHelpers)
set(LB2_CMAKE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/littlebit2)

install(DIRECTORY csrc/include/littlebit2 DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})

# $1: a library target; $2: its export set. A wheel cannot hold symbolic links: in the Python package the name that
# linkers look for is a line of text, which they follow.
function(lb2_install_library target export)
  if(LB2_BUILD_PYTHON)
    install(TARGETS ${target} EXPORT ${export} LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} NAMELINK_SKIP
      INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
    if(NOT APPLE)  # whose linker reads no such lines
      set(script ${CMAKE_CURRENT_BINARY_DIR}/namelink/lib${target}.so)
      file(WRITE ${script} "/* lib${target}.so.${LB2_ABI_VERSION} for linkers; load that one. */\nINPUT(lib${target}.so.${LB2_ABI_VERSION})\n")
      install(FILES ${script} DESTINATION ${CMAKE_INSTALL_LIBDIR})
    endif()
  else()
    install(TARGETS ${target} EXPORT ${export} LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
      INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
  endif()
  install(EXPORT ${export} NAMESPACE littlebit2:: DESTINATION ${LB2_CMAKE_DIR})
endfunction()

# $1: name; $2: library; $3: description; $4: what it requires.
function(lb2_install_pkgconfig LB2_PC_NAME LB2_PC_LIBRARY LB2_PC_DESCRIPTION LB2_PC_REQUIRES)
  if(IS_ABSOLUTE "${CMAKE_INSTALL_LIBDIR}" OR IS_ABSOLUTE "${CMAKE_INSTALL_INCLUDEDIR}")
    message(FATAL_ERROR "CMAKE_INSTALL_LIBDIR and CMAKE_INSTALL_INCLUDEDIR must be relative to the prefix, got "
      "${CMAKE_INSTALL_LIBDIR} and ${CMAKE_INSTALL_INCLUDEDIR}")
  endif()
  file(RELATIVE_PATH up "/prefix/${CMAKE_INSTALL_LIBDIR}/pkgconfig" "/prefix")
  string(REGEX REPLACE "/$" "" up "${up}")
  set(LB2_PC_PREFIX "\${pcfiledir}/${up}")
  configure_file(cmake/littlebit2.pc.in ${LB2_PC_NAME}.pc @ONLY)
  install(FILES ${CMAKE_CURRENT_BINARY_DIR}/${LB2_PC_NAME}.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
endfunction()

lb2_install_library(littlebit2 littlebit2-targets)
lb2_install_pkgconfig(littlebit2 littlebit2 "CPU kernels for sub-1-bit linear layers" "")
if(TARGET littlebit2_cuda)
  lb2_install_library(littlebit2_cuda littlebit2-cuda-targets)
  lb2_install_pkgconfig(littlebit2-cuda littlebit2_cuda "CUDA kernels for sub-1-bit linear layers"
    "littlebit2 = ${PROJECT_VERSION}")
endif()

configure_package_config_file(cmake/littlebit2-config.cmake.in littlebit2-config.cmake
  INSTALL_DESTINATION ${LB2_CMAKE_DIR} NO_SET_AND_CHECK_MACRO NO_CHECK_REQUIRED_COMPONENTS_MACRO)
# Before 1.0, a minor version may break programs.
write_basic_package_version_file(littlebit2-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/littlebit2-config.cmake
  ${CMAKE_CURRENT_BINARY_DIR}/littlebit2-config-version.cmake DESTINATION ${LB2_CMAKE_DIR})
